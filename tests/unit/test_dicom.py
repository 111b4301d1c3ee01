"""DICOM: geometry by positions alone, SEG labels on the image's grid, and what is refused."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    generate_uid,
)

from fedseg.errors import DataError
from fedseg.imaging.cases import Case
from fedseg.imaging.dicom import read_series
from fedseg.imaging.dicom_folders import list_dicom
from fedseg.imaging.readers import read_case, read_image
from fedseg.imaging.volumes import Volume
from fedseg.task import Task

TURN = np.array([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])


def task(modality: str = "CT", *labels: str) -> Task:
    return Task.model_validate(
        {
            "dimensions": 3,
            "channels": [{"name": "image", "modality": modality}],
            "labels": {name: n for n, name in enumerate(labels or ("liver",), start=1)},
            "spacing_mm": [1, 1, 1],
            "patch_size": [8, 8, 8],
            "normalisation": {"CT": {"window_hu": [-160, 240]}},
        }
    )


def write_series(folder: Path, voxels: np.ndarray, *, step: float = 2.5) -> list[FileDataset]:
    """An oblique CT series; names and InstanceNumbers shuffled, SliceThickness wrong."""
    folder.mkdir(parents=True)
    study, series, frame = (generate_uid(entropy_srcs=[str(folder), n]) for n in "abc")
    numbers = np.random.default_rng(1).permutation(voxels.shape[2])
    written = []
    for k in range(voxels.shape[2]):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[series, str(k)])
        ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, frame
        ds.Modality, ds.PatientID, ds.PatientName = "CT", "P7", "Nobody^"
        ds.PatientBirthDate = ds.PatientSex = ds.StudyDate = ds.StudyTime = ""
        ds.AccessionNumber = ds.StudyID = ds.ReferringPhysicianName = ""
        ds.InstanceNumber, ds.SeriesNumber = int(numbers[k]) + 1, 1
        ds.SliceThickness = 9
        ds.PixelSpacing = [1.5, 0.5]
        ds.ImageOrientationPatient = [*TURN[:, 0], *TURN[:, 1]]
        ds.ImagePositionPatient = list(np.array([10.0, -20, 30]) + k * step * TURN[:, 2])
        ds.Rows, ds.Columns = voxels.shape[1], voxels.shape[0]
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated = ds.BitsStored = 16
        ds.HighBit, ds.PixelRepresentation = 15, 0
        ds.RescaleSlope, ds.RescaleIntercept = 2, -1000
        ds.PixelData = voxels[:, :, k].T.astype("<u2").tobytes()
        ds.save_as(folder / f"{numbers[k]:03d}.dcm", enforce_file_format=True)
        written.append(ds)
    return written


def write_seg(path: Path, sources: list[FileDataset], mask: np.ndarray, names: list[str]) -> None:
    """A BINARY SEG; mask (slices, rows, columns, segments)."""
    code = pydicom.sr.codedict.codes.SCT.Organ
    segments = [
        highdicom.seg.SegmentDescription(
            n, name, code, code, highdicom.seg.SegmentAlgorithmTypeValues.MANUAL
        )
        for n, name in enumerate(names, start=1)
    ]
    seg = highdicom.seg.Segmentation(
        sources,
        mask.astype(np.uint8),
        "BINARY",
        segments,
        generate_uid(entropy_srcs=["seg"]),
        2,
        generate_uid(entropy_srcs=["seg1"]),
        1,
        "m",
        "m",
        "1",
        "1",
        omit_empty_frames=True,
    )
    seg.save_as(path)


@pytest.fixture
def voxels() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 1200, (6, 5, 4))


def read(image: Path, label: Path | None = None, study: Task | None = None) -> Volume:
    return read_case(Case("c", "p", "a", "train", (image,), label), study or task())


def test_slices_are_placed_by_position_never_by_number(tmp_path: Path, voxels: np.ndarray) -> None:
    write_series(tmp_path / "s", voxels)
    series = read_series(tmp_path / "s")
    assert series.array.shape == (6, 5, 4) and series.modality == "CT"
    for index in [(0, 0, 0), (5, 2, 1), (3, 4, 3)]:
        at = series.affine_ras @ (*index, 1)
        lps = at[:3] * (-1, -1, 1) - (10, -20, 30)
        i, j, k = np.rint((TURN.T @ lps) / (0.5, 1.5, 2.5)).astype(int)
        assert np.allclose((TURN.T @ lps) / (0.5, 1.5, 2.5), (i, j, k), atol=1e-6)
        assert series.array[index] == 2 * voxels[i, j, k] - 1000


def test_a_gap_a_doubled_slice_and_two_series_are_named(tmp_path: Path, voxels: np.ndarray) -> None:
    written = write_series(tmp_path / "s", voxels)
    inner = next(
        p
        for p in (tmp_path / "s").iterdir()
        if pydicom.dcmread(p).SOPInstanceUID == written[1].SOPInstanceUID
    )
    content = inner.read_bytes()
    inner.unlink()
    with pytest.raises(DataError, match=r"2\.5 mm, but 1 gap.*1 slice\(s\) missing"):
        read_series(tmp_path / "s")
    for name in ("x.dcm", "y.dcm"):
        (tmp_path / "s" / name).write_bytes(content)
    with pytest.raises(DataError, match="occur twice"):
        read_series(tmp_path / "s")
    (tmp_path / "s" / "y.dcm").unlink()
    assert read_series(tmp_path / "s").array.shape == (6, 5, 4)
    write_series(tmp_path / "t", voxels)
    shutil.copy(next((tmp_path / "t").iterdir()), tmp_path / "s" / "z.dcm")
    with pytest.raises(DataError, match="mixes 2 series"):
        read_series(tmp_path / "s")


def test_an_enhanced_multiframe_file_reads_like_its_slices(
    tmp_path: Path, voxels: np.ndarray
) -> None:
    frames = write_series(tmp_path / "s", voxels)
    one = copy.deepcopy(frames[0])
    one.file_meta.MediaStorageSOPClassUID = one.SOPClassUID = EnhancedCTImageStorage
    one.NumberOfFrames, one.PixelData = 4, b"".join(f.PixelData for f in reversed(frames))
    shared, groups = pydicom.Dataset(), []
    for name in ("PixelSpacing", "SliceThickness", "ImageOrientationPatient"):
        delattr(one, name)
    shared.PixelMeasuresSequence = [items(PixelSpacing=[1.5, 0.5], SliceThickness=2.5)]
    shared.PlaneOrientationSequence = [
        items(ImageOrientationPatient=frames[0].ImageOrientationPatient)
    ]
    shared.PixelValueTransformationSequence = [
        items(RescaleSlope=2, RescaleIntercept=-1000, RescaleType="HU")
    ]
    for frame in reversed(frames):
        place = items(ImagePositionPatient=frame.ImagePositionPatient)
        groups.append(items(PlanePositionSequence=[place]))
    one.SharedFunctionalGroupsSequence, one.PerFrameFunctionalGroupsSequence = [shared], groups
    for name in ("ImagePositionPatient", "RescaleSlope", "RescaleIntercept"):
        delattr(one, name)
    one.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    (tmp_path / "m").mkdir()
    one.save_as(tmp_path / "m" / "all.dcm", enforce_file_format=True)
    apart, together = read_series(tmp_path / "s"), read_series(tmp_path / "m")
    assert np.allclose(apart.affine_ras, together.affine_ras)
    assert np.array_equal(apart.array, together.array)


def items(**values: object) -> pydicom.Dataset:
    dataset = pydicom.Dataset()
    for name, value in values.items():
        setattr(dataset, name, value)
    return dataset


def test_other_files_are_passed_over_and_broken_dicom_is_named(
    tmp_path: Path, voxels: np.ndarray
) -> None:
    write_series(tmp_path / "s", voxels)
    (tmp_path / "s" / "notes.txt").write_text("hello")
    assert read_series(tmp_path / "s").array.shape == (6, 5, 4)
    (tmp_path / "s" / "broken.dcm").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(DataError, match="not readable DICOM"):
        read_series(tmp_path / "s")
    (tmp_path / "e").mkdir()
    with pytest.raises(DataError, match="no DICOM image"):
        read_series(tmp_path / "e")


def test_a_seg_with_dropped_frames_lands_on_its_voxels(tmp_path: Path, voxels: np.ndarray) -> None:
    sources = write_series(tmp_path / "s", voxels)
    mask = np.zeros((4, 5, 6, 2), bool)
    mask[2, 1:3, 4, 0] = mask[2, 4, 0, 1] = True
    write_seg(tmp_path / "l.dcm", sources, mask, ["Liver", "Spleen"])
    volume = read(tmp_path / "s", tmp_path / "l.dcm", task("CT", "spleen", "liver"))
    assert volume.label is not None
    found = {
        tuple(int(n) for n in at): int(volume.label[tuple(at)]) for at in np.argwhere(volume.label)
    }
    # highdicom orders slices against the normal: slice 2 of 4 is index 1
    slices = {k for _, _, k in found}
    values = {(i, j): v for (i, j, _), v in found.items()}
    assert values == {(4, 1): 2, (4, 2): 2, (0, 4): 1} and len(slices) == 1
    (k,) = slices
    assert np.array_equal(volume.image[0, :, :, k], 2.0 * voxels[:, :, 2] - 1000)


def test_segments_that_overlap_or_are_unknown_are_refused(
    tmp_path: Path, voxels: np.ndarray
) -> None:
    sources = write_series(tmp_path / "s", voxels)
    write_seg(tmp_path / "l.dcm", sources, np.ones((4, 5, 6, 2), bool), ["Liver", "Spleen"])
    with pytest.raises(DataError, match=r"overlap: .*liver"):
        read(tmp_path / "s", tmp_path / "l.dcm", task("CT", "liver", "spleen"))
    with pytest.raises(DataError, match=r"2 \(Spleen\)"):
        read(tmp_path / "s", tmp_path / "l.dcm")
    one = Case("c", "p", "a", "train", (tmp_path / "s",), tmp_path / "l.dcm")
    volume = read_case(one, task(), [(1, 1), (2, 0)])
    assert volume.label is not None and volume.label.all()


def test_a_seg_of_another_frame_of_reference_is_refused(tmp_path: Path, voxels: np.ndarray) -> None:
    sources = write_series(tmp_path / "s", voxels)
    write_series(tmp_path / "other", voxels)
    write_seg(tmp_path / "l.dcm", sources, np.ones((4, 5, 6, 1), bool), ["Liver"])
    with pytest.raises(DataError, match="frame of reference"):
        read(tmp_path / "other", tmp_path / "l.dcm")


def test_a_nifti_label_in_another_orientation_is_turned_onto_the_series(
    tmp_path: Path, voxels: np.ndarray
) -> None:
    write_series(tmp_path / "s", voxels)
    volume = read(tmp_path / "s")
    truth = np.random.default_rng(0).integers(0, 2, volume.shape).astype(np.uint8)
    own = nibabel.Nifti1Image(truth, volume.affine_ras)
    nibabel.save(nibabel.as_closest_canonical(own), tmp_path / "l.nii.gz")
    label = read(tmp_path / "s", tmp_path / "l.nii.gz").label
    assert label is not None and np.array_equal(label, truth)
    shifted = volume.affine_ras.copy()
    shifted[0, 3] += 0.3
    nibabel.save(nibabel.Nifti1Image(truth, shifted), tmp_path / "l.nii.gz")
    with pytest.raises(DataError, match="does not lie on the grid"):
        read(tmp_path / "s", tmp_path / "l.nii.gz")


def test_a_folder_of_dicom_files_finds_series_and_their_segmentation(
    tmp_path: Path, voxels: np.ndarray
) -> None:
    sources = write_series(tmp_path / "ct" / "one", voxels)
    write_seg(tmp_path / "seg.dcm", sources, np.ones((4, 5, 6, 1), bool), ["Liver"])
    (row,) = list_dicom(tmp_path).rows
    assert (row.name, row.patient, row.label) == ("ct/one", "P7", tmp_path / "seg.dcm")


def test_real_jpeg2000_ct_decodes_with_its_nifti_label(real_data: Path) -> None:
    folder = real_data / "dicom" / "ct_jpeg2000"
    one = Case("c", "p", "a", "train", (folder / "CT",), folder / "example_seg_dicom.nii.gz")
    volume = read_case(one, task("CT", "organ"), [(1, 1), *((n, 0) for n in range(2, 118))])
    assert volume.image.shape == (1, 512, 512, 20)
    assert volume.spacing_mm == pytest.approx((0.9765625, 0.9765625, 2.0))
    assert volume.image.min() == -1024 and volume.label is not None
    raw = np.asanyarray(nibabel.load(folder / "example_seg_dicom.nii.gz").dataobj)
    assert np.array_equal(volume.label, np.flip(raw == 1, (1, 2)))


def test_real_seg_agrees_with_highdicom_and_the_true_slice_step(real_data: Path) -> None:
    folder = real_data / "dicom" / "ct_with_seg"
    volume = read(folder / "CT", folder / "SEG" / "liver.dcm")
    assert volume.spacing_mm == pytest.approx((0.810547, 0.810547, 1.0))
    seg = highdicom.seg.segread(folder / "SEG" / "liver.dcm").get_volume(combine_segments=True)
    image = highdicom.get_volume_from_series(
        [pydicom.dcmread(p) for p in (folder / "CT").iterdir()]
    )
    assert volume.label is not None
    assert np.array_equal(volume.label, seg.match_geometry(image).array.transpose(2, 1, 0))
    assert np.array_equal(volume.image[0], image.array.transpose(2, 1, 0))
    with pytest.raises(DataError, match="overlap"):
        read(
            folder / "CT",
            folder / "SEG" / "partial_overlaps.dcm",
            task("CT", "green", "orange", "purple", "light_blue", "dark_blue"),
        )


@pytest.mark.parametrize(
    ("folder", "shape"), [("mr_pgbm002", (35, 51, 32)), ("mr_pgbm003", (34, 50, 40))]
)
def test_real_mr_series_read(real_data: Path, folder: str, shape: tuple[int, ...]) -> None:
    path = real_data / "dicom" / folder / "HCropVolume"
    image, affine = read_image((path,), task("MR"))
    assert image.shape == (1, *shape) and abs(np.linalg.det(affine)) == pytest.approx(1)
    with pytest.raises(DataError, match="should be CT, the series says MR"):
        read_image((path,), task("CT"))


def test_real_jump_between_slices_is_named(real_data: Path) -> None:
    with pytest.raises(DataError, match=r"1\.25 mm, but 1 gap\(s\) of up to 202\.5 mm"):
        read_series(real_data / "dicom" / "ct_tiny_deid" / "CT")


def test_contours_are_refused_whether_their_references_resolve_or_not(real_data: Path) -> None:
    good = real_data / "dicom" / "ct_with_rtstruct"
    with pytest.raises(DataError, match="contours are not read;"):
        read(good / "CT", good / "RTSTRUCT" / "rt.dcm")
    bad = real_data / "bad" / "dicom_rtstruct_invalid_reference"
    with pytest.raises(DataError, match="3 of the 5 images they refer to are not there"):
        read(bad, bad / "invalid_reference_rt.dcm")
    assert read(bad).shape == (512, 512, 2)
