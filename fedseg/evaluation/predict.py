"""Masks of unlabelled images, written in each image's own geometry."""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedseg.durable import write_atomically
from fedseg.errors import DataError
from fedseg.evaluation.inference import predict_mask
from fedseg.imaging.readers import read_image
from fedseg.imaging.transforms import prepare, restore
from fedseg.imaging.volumes import Volume
from fedseg.learning.repeatable import repeatable
from fedseg.plan import StudyPlan

_NIFTI: Any = nibabel.nifti1.Nifti1Image


def predict_images(
    network: nn.Module,
    plan: StudyPlan,
    images: Sequence[Sequence[Path]],
    out: Path,
    *,
    note: str = "",
) -> Iterator[Path]:
    """Segment images one by one and write NAME_mask.nii.gz for each.

    Args:
        network: holds the model, on the device that is to be used.
        plan: task, overlap of the windows, threads.
        images: for each image its paths, one a channel in the plan's order; a folder is a DICOM
            series. NAME is the first path's name without .nii or .nii.gz.
        out: a folder; made where it does not exist.
        note: goes into the header of each mask (`descrip`, at most 79 ASCII characters).

    Yields:
        The path of each mask once it is written: uint8 in the study's label values, on the voxel
        grid and with the affine of its image.

    Raises:
        DataError: two images have the same name, or an image cannot be read or prepared.
    """
    names = [_name(paths[0]) for paths in images]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(
            f"{len(twice)} names belong to more than one image: their masks would overwrite each "
            "other; rename the files or predict them into different folders"
        )
    out.mkdir(parents=True, exist_ok=True)
    for name, paths in zip(names, images, strict=True):
        mask, affine = _predict(network, plan, paths)
        path = out / f"{name}_mask.nii.gz"
        write_mask(mask, affine, path, note)
        yield path


def write_mask(
    mask: NDArray[np.uint8], affine_ras: NDArray[np.float64], path: Path, note: str = ""
) -> None:
    """Write a mask as NIfTI: whole or not at all.

    Args:
        mask: uint8 (X, Y, Z).
        affine_ras: (4, 4), voxel index -> RAS+ mm; it goes into the sform, and into the qform where
            that can hold it (no shear).
        path: ends in .nii or .nii.gz; equal masks give equal bytes.
        note: for the header, at most 79 ASCII characters.

    Raises:
        StorageError: it cannot be written; a mask before it is untouched.
    """
    image: Any = _NIFTI(mask, affine_ras)
    image.set_sform(affine_ras, code="scanner")
    axes = affine_ras[:3, :3] / np.linalg.norm(affine_ras[:3, :3], axis=0)
    if np.allclose(axes.T @ axes, np.eye(3), atol=1e-5):
        image.set_qform(affine_ras, code="scanner")
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = note.encode("ascii")
    data: bytes = image.to_bytes()
    write_atomically(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def _predict(
    network: nn.Module, plan: StudyPlan, paths: Sequence[Path]
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """The mask of one image on its own grid, and the image's affine."""
    image, affine = read_image(paths, plan.task)
    prepared = prepare(Volume(image, None, affine), plan.task)
    with repeatable(plan.training.threads, 0, next(network.parameters()).device):
        mask = predict_mask(network, prepared, plan.task, plan.evaluation.overlap)
    return restore(mask, prepared, image.shape[1:], affine), affine


def _name(path: Path) -> str:
    """A file's name without .nii or .nii.gz; a folder's own."""
    name = path.absolute().name
    return name.removesuffix(".gz").removesuffix(".nii") if name.endswith((".nii", ".gz")) else name
