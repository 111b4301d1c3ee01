"""Prepared cases on disk, so that a round reads arrays instead of scans.

They are patient data: the folder is 0700 and its files 0600 whatever the umask says. An entry's
name is SHA-256 over the bytes of the case's files, the label map, the labels that it is annotated
with, the task and the format, so that a changed scan or plan never meets an old entry. Entries are
safetensors, written whole or not at all; one whose header, shapes or digest do not hold is made
again, never trusted. A folder that is not marked as a cache of fedseg is neither filled nor purged.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedseg.arrays import digest_of
from fedseg.errors import DataError
from fedseg.imaging.cases import Case
from fedseg.imaging.transforms import PreparedCase, prepare
from fedseg.task import Task

FORMAT = "fedseg-prepared/1"
MARKER = "CACHEDIR.TAG"
MARKER_TEXT = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# A cache of prepared cases made by fedseg. These are patient data.\n"
    "# Empty it with: fedseg-site cache purge\n"
)
ENTRY, UNFINISHED = ".safetensors", ".unfinished"

logger = logging.getLogger(__name__)


class CaseCache:
    """The prepared cases of one task.

    Args:
        root: the cache's folder; made where it does not exist.
        task: what the cases are prepared for.

    Raises:
        DataError: the folder holds other things, or cannot be made.
    """

    def __init__(self, root: Path, task: Task) -> None:
        self._root = Path(root)
        self._task = task
        self._digests: dict[tuple[str, int, int], str] = {}
        _adopt(self._root)

    def load(self, case: Case, label_map: tuple[tuple[int, int], ...] = ()) -> PreparedCase:
        """The case as `prepare` gives it, from the cache where it is there and sound.

        Args:
            case: images, label and annotated labels; its name, patient and site play no part.
            label_map: value in the files -> value in the study, as in `Manifest.label_map`.

        Raises:
            DataError: the case cannot be read or prepared, or the cache cannot be written.
        """
        from fedseg.imaging.readers import read_case

        path = self._root / (self._key(case, label_map) + ENTRY)
        found = _open_entry(path)
        if found is not None:
            return replace(found, annotated=case.annotated)
        prepared = prepare(read_case(case, self._task, label_map), self._task)
        _store(path, prepared)
        return replace(prepared, annotated=case.annotated)

    def _key(self, case: Case, label_map: tuple[tuple[int, int], ...]) -> str:
        """SHA-256 of everything that the prepared case depends on."""
        parts: dict[str, object] = {
            "format": FORMAT,
            "images": [self._content(path) for path in case.images],
            "label": None if case.label is None else self._content(case.label),
            "label_map": sorted(label_map),
            "task": self._task.model_dump(mode="json"),
        }
        if case.annotated is not None:
            parts["annotated"] = case.annotated
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def _content(self, path: Path) -> list[str]:
        """Digests of a file, or of every file of a series, whatever they are called."""
        try:
            files = [f for f in path.rglob("*") if f.is_file()] if path.is_dir() else [path]
            return sorted(self._digest(file) for file in files)
        except OSError as error:
            raise DataError(
                f"a file of the case cannot be read ({error.strerror}): check that the manifest "
                "names it rightly and that this user may read it"
            ) from None

    def _digest(self, path: Path) -> str:
        """SHA-256 of a file's bytes, remembered by this process while the file looks the same."""
        status = path.stat()
        seen = (str(path.absolute()), status.st_size, status.st_mtime_ns)
        if seen not in self._digests:
            with path.open("rb") as stream:
                self._digests[seen] = hashlib.file_digest(stream, "sha256").hexdigest()
        return self._digests[seen]


def purge(root: Path) -> int:
    """Delete every prepared case of a cache, finished or not; its folder and marker stay.

    Returns:
        How many bytes that freed.

    Raises:
        DataError: the folder is not a cache of fedseg, or a file cannot be deleted.
    """
    root = Path(root)
    if not _is_cache(root):
        raise DataError(
            f"this folder is no cache of fedseg (its {MARKER} is missing or another program's): "
            "nothing was deleted; name the folder that holds the prepared cases"
        )
    freed = 0
    try:
        for path in _entries(root):
            size = path.lstat().st_size
            path.unlink()
            freed += size
    except OSError as error:
        raise DataError(
            f"a prepared case cannot be deleted ({error.strerror}): purge as the user who owns "
            "the cache"
        ) from None
    return freed


def _entries(root: Path) -> Iterator[Path]:
    """What the cache itself wrote, less its marker."""
    yield from (p for p in sorted(root.iterdir()) if p.suffix in (ENTRY, UNFINISHED))


def _is_cache(root: Path) -> bool:
    """True where the folder has our marker, as a plain file."""
    marker = root / MARKER
    try:
        return not marker.is_symlink() and marker.read_bytes() == MARKER_TEXT.encode()
    except OSError:
        return False


def _adopt(root: Path) -> None:
    """Make and mark the folder, for its owner alone."""
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_cache(root):
            if any(root.iterdir()):
                raise DataError(
                    "the folder for the cache holds other things: name an empty folder or one "
                    "that does not exist yet"
                )
            _write_marker(root)
        root.chmod(0o700)
    except OSError as error:
        raise _not_writable(error) from None


def _write_marker(root: Path) -> None:
    """Mark an empty folder as ours; it is closed to others before anything is in it."""
    root.chmod(0o700)
    handle, unfinished = tempfile.mkstemp(dir=root, suffix=UNFINISHED)
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        os.fchmod(handle, 0o600)
        stream.write(MARKER_TEXT)
    Path(unfinished).replace(root / MARKER)


def _not_writable(error: OSError) -> DataError:
    """The cache's folder does not take what it should."""
    return DataError(
        f"the cache of prepared cases cannot be written ({error.strerror}): free space there, or "
        "name a folder that this user owns"
    )


def _store(path: Path, prepared: PreparedCase) -> None:
    """Write an entry beside its place, then move it there in one step."""
    arrays: dict[str, NDArray[np.generic]] = {
        "image": prepared.image,
        "affine_ras": prepared.affine_ras,
        "spacing_mm": np.array(prepared.spacing_mm, dtype=np.float64),
    }
    if prepared.label is not None:
        arrays["label"] = prepared.label
    facts = _facts(path.stem, arrays)
    unfinished: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=UNFINISHED)
        os.close(handle)
        unfinished = Path(name)
        save_file(arrays, unfinished, metadata=facts)
        unfinished.chmod(0o600)
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        if unfinished is not None:
            unfinished.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else OSError(0, "the write failed")
        raise _not_writable(cause) from None


def _facts(key: str, arrays: dict[str, NDArray[np.generic]]) -> dict[str, str]:
    """The metadata of an entry; a single item, because safetensors keeps no order of several."""
    return {"fedseg": " ".join((FORMAT, key, digest_of(arrays)))}


def _open_entry(path: Path) -> PreparedCase | None:
    """The entry, or None where there is none or it does not hold."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            facts = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _verified(arrays, facts, path.stem)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        logger.warning("a prepared case in the cache is damaged; it is made again")
        return None


def _verified(
    arrays: dict[str, NDArray[np.generic]], facts: dict[str, str], key: str
) -> PreparedCase:
    """The case, once its key, digest, types and shapes hold; else ValueError or KeyError."""
    image, affine, spacing = arrays["image"], arrays["affine_ras"], arrays["spacing_mm"]
    label = arrays.get("label")
    if (
        facts != _facts(key, arrays)
        or not {"image", "affine_ras", "spacing_mm"} <= set(arrays) <= {*_DTYPES}
        or any(array.dtype != _DTYPES[name] for name, array in arrays.items())
        or (image.ndim, affine.shape, spacing.shape) != (4, (4, 4), (3,))
        or (label is not None and label.shape != image.shape[1:])
    ):
        raise ValueError("the entry does not hold")
    x, y, z = (float(value) for value in spacing.astype(np.float64))
    return PreparedCase(
        image=image.astype(np.float32, copy=False),
        label=None if label is None else label.astype(np.uint8, copy=False),
        affine_ras=affine.astype(np.float64, copy=False),
        spacing_mm=(x, y, z),
    )


_DTYPES = {
    "image": np.dtype(np.float32),
    "label": np.dtype(np.uint8),
    "affine_ras": np.dtype(np.float64),
    "spacing_mm": np.dtype(np.float64),
}
