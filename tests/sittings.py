"""Two sittings of one phantom patient, a year apart: the lesion has grown, the patient lies elsewhere. Both can be
copied under other UIDs and patients; one Triton answers the truth of either, told apart by the shape of the images."""

import copy
from dataclasses import dataclass, replace
from datetime import date
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import UID

from deploy.hospital.phantom import PhantomLesion, PhantomSpec, _default_lps, t2_axial_grid, truth, truth_masks
from deploy.hospital.phantom_dicom import derived_uid, write_phantom
from tests.crash.small_study import Copy, cropped
from tests.fixtures.triton_truth import add_truth, build_truth_repository

FACTOR = 1.3
SHIFT_MM = (-17.0, 6.0, 23.0)
LESION = PhantomLesion(_default_lps(-12.0, 5.0, 1.0), (16.0, 16.0, 16.0))
"""Of 16 mm: on slices of 3 mm counting voxels tells its growth to within 2 percent, that of a smaller one not."""
FIRST = PhantomSpec(study_date=date(2025, 3, 2), lesions=(LESION,))


def _moved(lps_mm: tuple[float, float, float]) -> tuple[float, float, float]:
    x, y, z = (a + b for a, b in zip(lps_mm, SHIFT_MM, strict=True))
    return (x, y, z)


SECOND = PhantomSpec(
    study_date=date(2026, 3, 2),
    gland_centre_lps_mm=_moved(FIRST.gland_centre_lps_mm),
    lesions=(replace(LESION, centre_lps_mm=_moved(LESION.centre_lps_mm)),),
    growth_factor=FACTOR,
)
GROWTH_PERCENT = 100 * (truth(SECOND).lesions[0].volume_ml / truth(FIRST).lesions[0].volume_ml - 1)


@dataclass(frozen=True)
class Sitting:
    """One sitting as it was written, and its truth masks on its T2 grid."""

    spec: PhantomSpec
    datasets: list[Dataset]
    masks: dict[str, npt.NDArray[np.uint8]]

    def copy(self, name: str, patient_id: str, **values: Any) -> Copy:
        """The sitting under UIDs and an accession number of its own, of this patient, with other values."""
        spec = replace(self.spec, patient_id=patient_id, accession=derived_uid(f"sitting/{name}")[-12:])
        study_uid = derived_uid(f"sitting/{name}")
        return Copy(study_uid, spec, [self._instance(d, name, study_uid, spec, values) for d in self.datasets])

    def _instance(
        self, original: Dataset, name: str, study_uid: str, spec: PhantomSpec, values: dict[str, Any]
    ) -> bytes:
        dataset = copy.deepcopy(original)
        dataset.PatientID, dataset.AccessionNumber, dataset.StudyInstanceUID = (
            spec.patient_id,
            spec.accession,
            study_uid,
        )
        dataset.FrameOfReferenceUID = derived_uid(f"sitting/{name}/frame")
        dataset.SeriesInstanceUID = derived_uid(f"sitting/{name}/{original.SeriesNumber}")
        uid = UID(derived_uid(f"sitting/{name}/{original.SOPInstanceUID}"))
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = uid
        for keyword, value in values.items():
            setattr(dataset, keyword, value)
        buffer = BytesIO()
        dataset.save_as(buffer, enforce_file_format=True)
        return buffer.getvalue()


def write_sitting(folder: Path, spec: PhantomSpec, crop: slice) -> Sitting:
    """Write the phantom; `crop` is what is kept of rows and columns of T2."""
    datasets = []
    for number in (4, 7, 8):
        (series,) = write_phantom(spec, folder).glob(f"{number}-*") if number == 4 else folder.glob(f"{number}-*")
        read = [pydicom.dcmread(file) for file in sorted(series.glob("*.dcm"))]
        datasets += [cropped(d, crop) for d in read] if number == 4 else read
    masks = truth_masks(spec, t2_axial_grid(spec))
    return Sitting(spec, datasets, {name: mask[:, crop, crop] for name, mask in masks.items()})


def build_sittings(folder: Path) -> tuple[Sitting, Sitting, Path]:
    """Both sittings, and the model repository that answers either's truth."""
    first = write_sitting(folder / "first", FIRST, slice(96, 288))
    second = write_sitting(folder / "second", SECOND, slice(100, 284))
    models = build_truth_repository(folder / "models", *(first.masks[n] for n in ("gland", "zones", "lesions")))
    add_truth(models, second.masks)
    return first, second, models
