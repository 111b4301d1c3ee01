"""Tiny cases on disk, for the tests of everything that reads data."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np

from fedseg.task import Task

OBLIQUE = np.array(
    [[0.9, -0.3, 0.1, -20.0], [0.3, 0.95, 0.2, 5.0], [-0.1, -0.15, 2.4, 7.0], [0, 0, 0, 1]]
)
LPS = np.diag([-1.0, -2.0, 3.0, 1.0])


HEADER = "subject,site,split,patient\n"


def task(channels: int = 1, dimensions: int = 3, labels: int = 2) -> Task:
    return Task.model_validate(
        {
            "dimensions": dimensions,
            "channels": [{"name": f"T{n}", "modality": "MR"} for n in range(channels)],
            "labels": {f"part_{n}": n for n in range(1, labels + 1)},
            "spacing_mm": [1] * dimensions,
            "patch_size": [8] * dimensions,
        }
    )


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def image(shape: tuple[int, ...] = (5, 6, 7)) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def label(shape: tuple[int, ...] = (5, 6, 7)) -> np.ndarray:
    array = np.zeros(shape, dtype=np.uint8)
    array[1, 2, 3], array[2, 2, 3] = 1, 2
    return array


def folder_of(root: Path, *names: str, table: str | None = None) -> Path:
    for name in names:
        save(root / "images" / f"{name}.nii.gz", image())
        save(root / "labels" / f"{name}.nii.gz", label())
    if table is not None:
        (root / "sites.csv").write_text(table)
    return root
