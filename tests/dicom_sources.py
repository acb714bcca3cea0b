"""Source instances for the DICOM renderings: synthetic headers, and the real study with its truth masks."""

from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import pydicom
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

from mappings.model.findings import Findings
from mappings.model.ids import derive_uid
from mappings.model.measurement import Evidence
from mappings.model.study import Geometry, Volume
from tests.builders import FRAME_UID, STUDY_UID, T2W_UID, build_findings, build_gland, build_lesion

STUDY_DIR = Path(__file__).parents[2] / "shared" / "data" / "prostatex-0000"
TILT_RAD = 0.3


def build_sources(shape: tuple[int, int, int] = (11, 32, 40), **changes: Any) -> list[Dataset]:
    """Oblique axial T2 headers ascending along the normal, without pixel data, as a scanner states them."""
    return [_build_source(index, shape, changes) for index in range(shape[0])]


def _build_source(index: int, shape: tuple[int, int, int], changes: dict[str, Any]) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    cos, sin = np.cos(TILT_RAD), np.sin(TILT_RAD)
    position = np.array([-20.0, -16.0, -15.0]) + 3.0 * index * np.array([0.0, sin, cos])
    values: dict[str, object] = {
        "SpecificCharacterSet": "ISO_IR 100",
        "ImageType": ["ORIGINAL", "PRIMARY", "M"],
        "SOPClassUID": MRImageStorage,
        "SOPInstanceUID": derive_uid("test-study", "t2w", index),
        "StudyDate": "20260304",
        "StudyTime": "101500",
        "AcquisitionDate": "20260304",
        "AcquisitionTime": "101700",
        "AccessionNumber": "ACC-1",
        "Modality": "MR",
        "Manufacturer": "Scanner Works",
        "ManufacturerModelName": "Magnet 3",
        "ReferringPhysicianName": "Ferrer^R",
        "StudyDescription": "MR Prostate",
        "SeriesDescription": "t2_tse_tra",
        "PatientName": "Phantom^Peter",
        "PatientID": "TEST-001",
        "PatientBirthDate": "19610506",
        "PatientSex": "M",
        "PatientAge": "064Y",
        "StudyInstanceUID": STUDY_UID,
        "SeriesInstanceUID": T2W_UID,
        "StudyID": "S1",
        "SeriesNumber": 4,
        "InstanceNumber": shape[0] - index,
        "ImagePositionPatient": [f"{v:.6f}" for v in position],
        "ImageOrientationPatient": ["1", "0", "0", "0", f"{cos:.6f}", f"{-sin:.6f}"],
        "FrameOfReferenceUID": FRAME_UID,
        "PositionReferenceIndicator": "",
        "SliceThickness": "3",
        "SpacingBetweenSlices": "3",
        "Rows": shape[1],
        "Columns": shape[2],
        "PixelSpacing": ["1", "1"],
    }
    for keyword, value in {**values, **changes}.items():
        if value is not None:
            setattr(ds, keyword, value)
    return ds


def build_volumes(shape: tuple[int, int, int] = (11, 32, 40)) -> dict[str, Volume]:
    """T2W, ADC and high-b volumes on the grid of `build_sources`, with a smooth pattern to window."""
    cos, sin = np.cos(TILT_RAD), np.sin(TILT_RAD)
    affine = ((1, 0, 0, -20.0), (0, cos, sin * 3, -16.0), (0, -sin, cos * 3, -15.0), (0, 0, 0, 1))
    geometry = Geometry(shape, affine, FRAME_UID)
    z, y, x = np.indices(shape)
    base = (np.sin(x / 3) + np.cos(y / 4) + z / 5).astype(np.float32)
    uids = tuple(derive_uid("test-study", "t2w", index) for index in range(shape[0]))
    return {
        "t2w": Volume(base * 100 + 300, geometry, T2W_UID, uids),
        "adc": Volume(base * 300 + 1200, geometry, derive_uid("test-study", "adc")),
        "hbv": Volume(40 - base * 10, geometry, derive_uid("test-study", "hbv")),
    }


@cache
def load_real_series(number: int) -> tuple[Dataset, ...]:
    """The instances of one series of the real study, ascending along the slice normal, with pixels."""
    (folder,) = (STUDY_DIR / "images").glob(f"{number}.*")
    instances = [pydicom.dcmread(path) for path in folder.glob("*.dcm")]
    return tuple(sorted(instances, key=_position_mm))


def _position_mm(instance: Dataset) -> float:
    orientation = np.array(instance.ImageOrientationPatient, dtype=float)
    normal = np.cross(orientation[:3], orientation[3:])
    return float(normal @ np.array(instance.ImagePositionPatient, dtype=float))


def _to_image(series: tuple[Dataset, ...]) -> sitk.Image:
    """The series as an ITK image in LPS mm."""
    first, last = series[0], series[-1]
    orientation = np.array(first.ImageOrientationPatient, dtype=float)
    span = np.subtract(last.ImagePositionPatient, first.ImagePositionPatient).astype(float)
    thickness = float(np.linalg.norm(span)) / (len(series) - 1)
    image = sitk.GetImageFromArray(np.stack([ds.pixel_array for ds in series]).astype(np.float32))
    image.SetOrigin([float(v) for v in first.ImagePositionPatient])
    row_mm, column_mm = (float(v) for v in first.PixelSpacing)
    image.SetSpacing([column_mm, row_mm, thickness])
    axes = np.column_stack([orientation[:3], orientation[3:], np.cross(orientation[:3], orientation[3:])])
    image.SetDirection(axes.ravel().tolist())
    return image


@cache
def load_real_volumes() -> dict[str, Volume]:
    """T2W, ADC and high-b of the real study, all on the T2W grid."""
    t2w_series = load_real_series(4)
    t2w = _to_image(t2w_series)
    direction = np.array(t2w.GetDirection()).reshape(3, 3)
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array(t2w.GetSpacing())
    affine[:3, 3] = t2w.GetOrigin()
    geometry = Geometry(
        tuple(reversed(t2w.GetSize())),
        tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in affine),
        t2w_series[0].FrameOfReferenceUID,
    )
    volumes = {}
    for role, number in (("t2w", 4), ("adc", 7), ("hbv", 8)):
        series = load_real_series(number)
        on_grid = sitk.Resample(_to_image(series), t2w, sitk.Transform(), sitk.sitkLinear, 0.0)
        uids = tuple(ds.SOPInstanceUID for ds in series) if role == "t2w" else ()
        volumes[role] = Volume(sitk.GetArrayFromImage(on_grid), geometry, series[0].SeriesInstanceUID, uids)
    return volumes


def load_truth(name: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
    """A truth mask as `(slices, rows, columns)` and its 4x4 affine (column, row, slice) -> LPS mm."""
    nifti: Any = nibabel.load(STUDY_DIR / "truth" / f"{name}.nii.gz")
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ nifti.affine
    return np.ascontiguousarray(np.asarray(nifti.dataobj).astype(np.uint8).T), lps


def load_real_masks() -> dict[str, npt.NDArray[np.uint8]]:
    """The truth masks as the model's tensors would state them (lesion label 1)."""
    lesions = (load_truth("lesion")[0] > 0).astype(np.uint8)
    return {"gland": load_truth("gland")[0], "zones": load_truth("zones")[0], "lesions": lesions}


def build_real_findings() -> Findings:
    """The builders' findings about the real study: one lesion, evidence on its largest slice."""
    t2w = load_real_series(4)
    masks = load_real_masks()
    frames = {name: int(masks[name].sum(axis=(1, 2)).argmax()) for name in ("gland", "lesions")}
    uid = t2w[0].SeriesInstanceUID
    lesion = replace(
        build_lesion(),
        centroid_lps_mm=(28.0, 33.2, -38.4),
        evidence=(Evidence("t2w", uid, t2w[frames["lesions"]].SOPInstanceUID, frames["lesions"]),),
    )
    gland = replace(
        build_gland(),
        evidence=(Evidence("t2w", uid, t2w[frames["gland"]].SOPInstanceUID, frames["gland"]),),
    )
    return build_findings(
        lesions=(lesion,),
        findings=(gland, lesion),
        job_id="real-job",
        created_at=datetime(2026, 3, 4, 10, 30, tzinfo=UTC),
        study_instance_uid=t2w[0].StudyInstanceUID,
        accession_number=t2w[0].AccessionNumber,
        reference_frame_uid=t2w[0].FrameOfReferenceUID,
    )
