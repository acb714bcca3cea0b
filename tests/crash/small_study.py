"""A small phantom study, cropped to a part of the gland, and fresh copies of it under other UIDs."""

import copy
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import UID

from deploy.hospital.chart import chart_bundle
from deploy.hospital.phantom import PhantomSpec, t2_axial_grid, truth_masks
from deploy.hospital.phantom_dicom import derived_uid, write_phantom
from tests.fixtures.triton_truth import build_truth_repository

FIRST_SLICE, SLICES = 5, 7
CROP = slice(96, 288)
SPEC = PhantomSpec()


@dataclass(frozen=True)
class Copy:
    """One copy: its UID, its patient's chart, and its instances as they are stored."""

    study_uid: str
    spec: PhantomSpec
    instances: list[bytes]

    @property
    def chart(self) -> dict[str, object]:
        """The patient's chart as a transaction."""
        return chart_bundle(self.spec)


class SmallStudy:
    """Seven slices of T2 (192 x 192), ADC and high-b."""

    def __init__(self, folder: Path) -> None:
        written = write_phantom(SPEC, folder)
        self._datasets: list[Dataset] = []
        for number in (4, 7, 8):
            (series,) = written.glob(f"{number}-*")
            files = sorted(series.glob("*.dcm"))[FIRST_SLICE : FIRST_SLICE + SLICES]
            datasets = [pydicom.dcmread(file) for file in files]
            self._datasets += [cropped(d) for d in datasets] if number == 4 else datasets

    def copy(self, name: str) -> Copy:
        """The study under UIDs, patient and accession number of its own, derived from `name`."""
        spec = replace(SPEC, patient_id=f"CRASH-{name}", accession=derived_uid(name)[-12:])
        study_uid = derived_uid(f"crash/{name}")
        instances = []
        for original in self._datasets:
            dataset = copy.deepcopy(original)
            dataset.PatientID, dataset.AccessionNumber = spec.patient_id, spec.accession
            dataset.StudyInstanceUID = study_uid
            dataset.FrameOfReferenceUID = derived_uid(f"crash/{name}/frame")
            dataset.SeriesInstanceUID = derived_uid(f"crash/{name}/{original.SeriesNumber}")
            uid = derived_uid(f"crash/{name}/{original.SOPInstanceUID}")
            dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = UID(uid)
            buffer = BytesIO()
            dataset.save_as(buffer, enforce_file_format=True)
            instances.append(buffer.getvalue())
        return Copy(study_uid, spec, instances)


def cropped(dataset: Dataset, crop: slice = CROP) -> Dataset:
    """The middle of a T2 slice, at the place where it was."""
    row, column = np.array(dataset.ImageOrientationPatient, float).reshape(2, 3)
    down, across = (float(s) for s in dataset.PixelSpacing)
    corner = np.array(dataset.ImagePositionPatient, float) + crop.start * (across * row + down * column)
    pixels = dataset.pixel_array[crop, crop]
    dataset.ImagePositionPatient = [f"{v:.8f}"[:16] for v in corner]
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.PixelData = np.ascontiguousarray(pixels).tobytes()
    return dataset


def build_small_truth(folder: Path, *, sleep_s: float = 0.0, instances: int = 1) -> Path:
    """A model repository that answers the phantom's truth on the grid of `SmallStudy`, after a wait; so many requests
    at one time."""
    masks = truth_masks(SPEC, t2_axial_grid(SPEC))
    part = {k: v[FIRST_SLICE : FIRST_SLICE + SLICES, CROP, CROP] for k, v in masks.items()}
    build_truth_repository(folder, part["gland"], part["zones"], part["lesions"], sleep_s=sleep_s)
    config = next(folder.glob("*/config.pbtxt"))
    text = config.read_text()
    assert "count: 1" in text
    config.write_text(text.replace("count: 1", f"count: {instances}"))
    return folder
