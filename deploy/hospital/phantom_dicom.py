"""Writes the phantom as a DICOM study with the attributes that a Siemens MR scanner gives.

`write_phantom(spec, folder)` makes one folder a series; UIDs are derived (2.25 and UUIDv5), so that the
same patient, accession and date always give the same study.
"""

import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, MRImageStorage

from deploy.hospital.phantom import Grid, PhantomSpec
from deploy.hospital.phantom_image import volumes

NAMESPACE = uuid.UUID("7b0f3b7e-6f0c-5a4b-9a43-0d6f8f1c2e51")
IMPLEMENTATION_UID = UID(f"2.25.{uuid.uuid5(NAMESPACE, 'implementation').int}")


@dataclass(frozen=True)
class SeriesAttributes:
    """What the scanner says about one series, beside its geometry and the study's own attributes."""

    number: int
    description: str
    protocol: str
    image_type: tuple[str, ...]
    sequence_name: str
    scanning_sequence: str
    scan_options: tuple[str, ...]
    repetition_time_ms: float
    echo_time_ms: float
    echo_train_length: int
    flip_angle_deg: float
    b_value_s_mm2: int | None = None
    diffusion_standard: bool = False
    """Whether the b-value also stands in the standard attribute, as newer scanners have it."""


def series_attributes(spec: PhantomSpec) -> dict[str, SeriesAttributes]:
    """By the roles of `phantom_image.volumes`."""
    original = ("ORIGINAL", "PRIMARY", "M", "NORM", "DIS2D")
    derived = ("DERIVED", "PRIMARY", "DIFFUSION")
    t2 = ("*tse2d1_25", "SE", ())
    diffusion = ("*ep_b50_800", "EP", ("PFP", "FS"))
    name = "ep2d_diff_tra"
    return {
        "t2w_sagittal": SeriesAttributes(3, "t2_tse_sag", "t2_tse_sag", original, *t2, 5590, 101, 25, 160),
        "t2w": SeriesAttributes(4, "t2_tse_tra", "t2_tse_tra", original, *t2, 5660, 104, 25, 160),
        "adc": SeriesAttributes(
            7, f"{name}_DYNDIST_ADC", name, (*derived, "ADC", "DIS2D"), *diffusion, 2700, 63, 48, 90, 800
        ),
        "hbv": SeriesAttributes(
            8,
            f"{name}_DYNDISTCALC_BVAL",
            name,
            (*derived, "TRACEW", "DIS2D"),
            *diffusion,
            2700,
            63,
            48,
            90,
            spec.high_b_s_mm2,
            diffusion_standard=True,
        ),
    }


def study_instance_uid(spec: PhantomSpec) -> str:
    """The study's UID; all others are derived from it."""
    return derived_uid(f"{spec.patient_id}/{spec.accession}/{spec.study_date.isoformat()}")


def derived_uid(name: str) -> str:
    """`2.25.` and the integer of a UUIDv5 (PS3.5 B.2): the same name, the same UID."""
    return f"2.25.{uuid.uuid5(NAMESPACE, name).int}"


def write_phantom(spec: PhantomSpec, folder: Path) -> Path:
    """Write the study under `folder`, one folder a series, and return `folder`."""
    attributes = series_attributes(spec)
    for role, (grid, image) in volumes(spec).items():
        series = attributes[role]
        series_folder = folder / f"{series.number}-{series.description}"
        series_folder.mkdir(parents=True, exist_ok=True)
        for index in range(grid.shape[0]):
            dataset = _instance(spec, series, grid, index, image)
            dataset.save_as(series_folder / f"{index + 1:03d}.dcm", enforce_file_format=True)
    return folder


def _instance(
    spec: PhantomSpec, series: SeriesAttributes, grid: Grid, index: int, image: NDArray[np.uint16]
) -> Dataset:
    study_uid = study_instance_uid(spec)
    dataset = Dataset()
    dataset.SOPClassUID = MRImageStorage
    dataset.SOPInstanceUID = derived_uid(f"{study_uid}/{series.number}/{index + 1}")
    dataset.StudyInstanceUID = study_uid
    dataset.SeriesInstanceUID = derived_uid(f"{study_uid}/{series.number}")
    dataset.FrameOfReferenceUID = derived_uid(f"{study_uid}/frame-of-reference")
    _add_patient_and_study(dataset, spec)
    _add_equipment(dataset)
    _add_series(dataset, spec, series, index)
    _add_sequence(dataset, series)
    _add_geometry(dataset, grid, index)
    _add_pixels(dataset, image, index)
    dataset.file_meta = _file_meta(dataset)
    return dataset


def _file_meta(dataset: Dataset) -> FileMetaDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = IMPLEMENTATION_UID
    return meta


def _add_patient_and_study(dataset: Dataset, spec: PhantomSpec) -> None:
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.PatientName = spec.patient_name
    dataset.PatientID = spec.patient_id
    dataset.PatientBirthDate = spec.birth_date.strftime("%Y%m%d")
    dataset.PatientSex = spec.sex
    dataset.PatientAge = f"{(spec.study_date - spec.birth_date).days // 365.2425:03.0f}Y"
    dataset.PatientWeight = 82
    dataset.StudyDate = spec.study_date.strftime("%Y%m%d")
    dataset.StudyTime = spec.study_time
    dataset.AccessionNumber = spec.accession
    dataset.StudyID = "1"
    dataset.ReferringPhysicianName = ""
    dataset.StudyDescription = "MR prostate multiparametric"


def _add_equipment(dataset: Dataset) -> None:
    dataset.Modality = "MR"
    dataset.Manufacturer = "SIEMENS"
    dataset.ManufacturerModelName = "Phantom (Wetread simulator)"
    dataset.SoftwareVersions = "syngo MR D11"
    dataset.MagneticFieldStrength = 3
    dataset.ImagingFrequency = 123.24244
    dataset.ImagedNucleus = "1H"
    dataset.TransmitCoilName = "Body"


def _add_series(dataset: Dataset, spec: PhantomSpec, series: SeriesAttributes, index: int) -> None:
    dataset.SeriesNumber = series.number
    dataset.SeriesDescription = series.description
    dataset.ProtocolName = series.protocol
    dataset.BodyPartExamined = "PROSTATE"
    dataset.PatientPosition = "FFS"
    dataset.PositionReferenceIndicator = ""
    dataset.InstanceNumber = index + 1
    dataset.AcquisitionNumber = 1
    for kind in ("Series", "Acquisition", "Content", "InstanceCreation"):
        setattr(dataset, f"{kind}Date", dataset.StudyDate)
        setattr(dataset, f"{kind}Time", spec.study_time)
    dataset.ImageType = list(series.image_type)


def _add_sequence(dataset: Dataset, series: SeriesAttributes) -> None:
    dataset.ScanningSequence = series.scanning_sequence
    dataset.SequenceVariant = ["SK", "SP", "OSP"]
    dataset.ScanOptions = list(series.scan_options)
    dataset.MRAcquisitionType = "2D"
    dataset.SequenceName = series.sequence_name
    dataset.AngioFlag = "N"
    dataset.RepetitionTime = series.repetition_time_ms
    dataset.EchoTime = series.echo_time_ms
    dataset.EchoNumbers = 1
    dataset.EchoTrainLength = series.echo_train_length
    dataset.FlipAngle = series.flip_angle_deg
    dataset.NumberOfAverages = 4
    dataset.InPlanePhaseEncodingDirection = "ROW"
    if series.b_value_s_mm2 is not None:
        private = dataset.private_block(0x0019, "SIEMENS MR HEADER", create=True)
        private.add_new(0x0C, "IS", str(series.b_value_s_mm2))
        if series.diffusion_standard:
            dataset.DiffusionBValue = float(series.b_value_s_mm2)


def _add_geometry(dataset: Dataset, grid: Grid, index: int) -> None:
    dataset.ImagePositionPatient = [f"{value:.8f}"[:16] for value in grid.slice_origin(index)]
    dataset.ImageOrientationPatient = [f"{value:.8f}" for value in (*grid.row, *grid.column)]
    dataset.SliceLocation = f"{grid.slice_origin(index) @ grid.normal:.6f}"
    dataset.SliceThickness = min(3.0, grid.spacing_mm[0])
    dataset.SpacingBetweenSlices = grid.spacing_mm[0]
    dataset.PixelSpacing = list(grid.spacing_mm[1:])


def _add_pixels(dataset: Dataset, image: NDArray[np.uint16], index: int) -> None:
    pixels = image[index]
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation = 0
    dataset.SmallestImagePixelValue = int(pixels.min())
    dataset.LargestImagePixelValue = int(pixels.max())
    low, high = np.percentile(image, (1, 99.5))
    dataset.WindowCenter, dataset.WindowWidth = int((low + high) / 2), max(1, int(high - low))
    dataset.PixelData = pixels.astype("<u2").tobytes()
