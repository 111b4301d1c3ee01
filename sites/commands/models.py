"""`fedseg-site predict`: use a study's final model, or a model file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedseg.commands import models
from fedseg.errors import DataError
from sites.commands.options import HERE, SiteOption, open_site

PREDICT_EPILOG = """
Examples:

  fedseg-site predict lung scan.nii.gz --out masks --site /var/lib/fedseg

  fedseg-site predict models/lung.safetensors dicom-folder --out masks
"""


def predict(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A study whose model has arrived, or a file.")
    ],
    images: Annotated[
        list[Path], typer.Argument(help="NIfTI files or folders of a DICOM series; one an image.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for NAME_mask.nii.gz.")],
    device: models.Device = "cpu",
    site: SiteOption = HERE,
) -> None:
    """Segment images; masks are NIfTI files in each image's own geometry."""
    models.predict(_model_file(model, site), images, out, device)


def _model_file(model: str, site: Path) -> Path:
    """The file that is meant: a path to one, or the name of a study of this site."""
    path = Path(model)
    if path.is_file() or path.suffix == ".safetensors" or len(path.parts) > 1:
        return path
    folder = open_site(site)
    if folder.model(model).is_file():
        return folder.model(model)
    there = ", ".join(sorted(file.stem for file in folder.models.glob("*.safetensors"))) or "none"
    raise DataError(
        f"no final model of {model[:80]!r} is here (models: {there}); it arrives when the study "
        "ends"
    )
