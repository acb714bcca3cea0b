"""From files in the spool to the `Study` noun and the volumes of its roles, or a reason why not."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pydicom
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.pixels.utils import get_expected_length
from pydicom.uid import UID

from mappings.inputs.dicom_to_study import datasets_to_study
from mappings.model.findings import RoleChoice
from mappings.model.protocol import Protocol
from mappings.model.study import Series, Study, Volume
from mappings.reading.series_to_volume import SeriesUnusable, Stack, series_to_stack, stack_to_volume
from mappings.reading.volumes_to_tensors import FramesDiffer, resample
from middleware.errors import Stopped

_PIXEL_DATA = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
MAX_REASONS = 10
"""Reasons of one kind that are listed one by one; the rest is counted."""


@dataclass(frozen=True)
class RoleImages:
    """By role: the volume on the reference grid, and the instances it came from in slice order."""

    volumes: Mapping[str, Volume]
    sources: Mapping[str, tuple[Dataset, ...]]


def read_study(folder: Path) -> Study:
    """The study in `folder`. Raises Stopped (unusable) naming every file that is damaged, belongs to another
    patient or study, or contradicts the rest: a transfer that broke or mixed is not read at all."""
    headers: list[tuple[str, Dataset]] = []
    damaged: list[str] = []
    for file in sorted(p for p in folder.iterdir() if p.is_file()):
        try:
            headers.append((file.name, _read_header(file)))
        except Exception as e:  # whatever a broken file makes pydicom raise, it is this file that is broken
            damaged.append(f"{file.name}: cannot be read as DICOM, or is cut short ({type(e).__name__}: {e})")
    if damaged:
        raise Stopped("unusable", shorten_list(damaged))
    if not headers:
        raise Stopped("unusable", (f"{folder.name}: holds no DICOM instance",))
    study = datasets_to_study(headers)
    if study.problems:
        raise Stopped("unusable", shorten_list([p.message for p in study.problems]))
    return study


def _read_header(file: Path) -> Dataset:
    """The dataset without its pixels, which are read once to see that all of them are there."""
    dataset = pydicom.dcmread(file)
    if not dataset.get("SOPInstanceUID") or not dataset.get("StudyInstanceUID"):
        raise ValueError("states no SOP Instance UID or Study Instance UID")
    syntax = UID(dataset.file_meta.get("TransferSyntaxUID", "1.2.840.10008.1.2"))
    _refuse_cut_short(dataset)
    if "PixelData" in dataset and not syntax.is_compressed:
        length, expected = len(dataset.PixelData or b""), get_expected_length(dataset)
        if length < expected:
            raise ValueError(f"pixel data holds {length} bytes, its matrix needs {expected}")
    for keyword in _PIXEL_DATA:
        if keyword in dataset:
            del dataset[keyword]
    return dataset


def _refuse_cut_short(dataset: Dataset) -> None:
    """Raise ValueError for a file that ends inside an element, or before the pixels of an image. pydicom reads
    both without a word."""
    last = dataset.get_item(max(dataset.keys()))
    if isinstance(last, RawDataElement) and last.length != 0xFFFFFFFF and len(last.value or b"") < last.length:
        raise ValueError(f"ends inside element {last.tag}")
    kind = UID(dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID") or "")
    if kind.name.endswith("Image Storage") and not any(keyword in dataset for keyword in _PIXEL_DATA):
        raise ValueError(f"is a {kind.name.removesuffix(' Storage')} without pixel data")


def check_roles(study: Study, protocol: Protocol, roles: Sequence[RoleChoice]) -> None:
    """Raise Stopped (unusable) unless every required role has a series whose slices make one regular volume."""
    reasons: list[str] = []
    for choice in roles:
        if choice.series_instance_uid is None:
            if choice.required:
                reasons.append(f"no series can be the {choice.title} ({choice.role}): " + "; ".join(choice.reasons))
            continue
        try:
            stack_role(study, protocol, choice)
        except SeriesUnusable as problem:
            if choice.required:
                reasons.extend(
                    f"{choice.title} ({choice.role}), series {choice.series_label}: {p.message}"
                    for p in problem.problems
                )
    if reasons:
        raise Stopped("unusable", shorten_list(reasons))


def shorten_list(reasons: Sequence[str]) -> tuple[str, ...]:
    """The first reasons, and how many more there are."""
    rest = len(reasons) - MAX_REASONS
    return (*reasons[:MAX_REASONS], *((f"and {rest} more of this kind",) if rest > 0 else ()))


def stack_role(study: Study, protocol: Protocol, choice: RoleChoice) -> Stack:
    """The ordered slices of the series that plays a role. Raises SeriesUnusable."""
    series = study.find_series(choice.series_instance_uid or "")
    return series_to_stack(series, protocol.role(choice.role).geometry, patient_id=study.patient.patient_id)


def load_roles(folder: Path, study: Study, protocol: Protocol, roles: Sequence[RoleChoice]) -> RoleImages:
    """Decode and resample the series of all roles that have one. Raises Stopped (unusable) for a required role;
    an optional role that cannot be decoded is left out."""
    volumes: dict[str, Volume] = {}
    sources: dict[str, tuple[Dataset, ...]] = {}
    reference_role = protocol.measure.reference_role
    for choice in sorted(roles, key=lambda c: c.role != reference_role):
        if choice.series_instance_uid is None or not _is_needed(protocol, choice.role):
            continue
        try:
            stack = stack_role(study, protocol, choice)
            volume, datasets = _decode(folder, study.find_series(choice.series_instance_uid), stack)
            if choice.role != reference_role:
                volume = resample(volume, volumes[reference_role].geometry)
        except (SeriesUnusable, FramesDiffer) as problem:
            if choice.required:
                reason = f"{choice.title} ({choice.role}), series {choice.series_label}: {problem}"
                raise Stopped("unusable", (reason,)) from problem
            continue
        volumes[choice.role], sources[choice.role] = volume, datasets
    return RoleImages(volumes, sources)


def _is_needed(protocol: Protocol, role: str) -> bool:
    """Whether the model or a measurement looks at a role (a DCE series may be there only to be named)."""
    looked_at = {tensor.role for tensor in protocol.model.inputs}
    return role in looked_at | {protocol.measure.reference_role, protocol.measure.adc_role}


def _decode(folder: Path, series: Series, stack: Stack) -> tuple[Volume, tuple[Dataset, ...]]:
    wanted = {instance.sop_instance_uid: instance.file for instance in stack.instances}
    datasets = tuple(_read_instances(folder, wanted))
    volume = stack_to_volume(series, stack, {str(ds.SOPInstanceUID): ds for ds in datasets})
    return volume, datasets


def _read_instances(folder: Path, wanted: Mapping[str, str]) -> Iterator[Dataset]:
    """The instances of these UIDs, in their order. Their files have the given names, unless the study was fetched again
    and came in another order. Raises Stopped (failed) where one is there no more."""
    found: dict[str, Path] | None = None
    for uid, name in wanted.items():
        file = folder / name
        dataset = pydicom.dcmread(file) if file.is_file() else None
        if dataset is None or dataset.SOPInstanceUID != uid:
            found = _find_instances(folder) if found is None else found
            if uid not in found:
                reason = "an image that was read first is no longer in the PACS; a new event reads the study anew"
                raise Stopped("failed", (reason,))
            dataset = pydicom.dcmread(found[uid])
        yield dataset


def _find_instances(folder: Path) -> dict[str, Path]:
    files = [file for file in folder.iterdir() if file.is_file()]
    return {str(pydicom.dcmread(f, specific_tags=["SOPInstanceUID"]).SOPInstanceUID): f for f in files}
