"""Whether a result may leave: every artifact against the findings, and against its own standard.

Each judge is one that did not write the artifact: pydicom for DICOM, hl7apy for HL7 v2, fhirkit for FHIR R4.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from io import BytesIO
from typing import Any

import numpy.typing as npt
import pydicom
from hl7apy.consts import VALIDATION_LEVEL  # type: ignore[import-untyped]
from hl7apy.parser import parse_message  # type: ignore[import-untyped]
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import UID

from mappings.model.findings import Findings
from mappings.outputs.consistency import check_consistency
from mappings.outputs.findings_to_bundle import check_bundle

DICOM_MAX_BYTES = 512 * 1024 * 1024
TEXT_MAX_BYTES = 16 * 1024 * 1024
"""An artifact that is larger is a mistake: no result of one study comes near it."""

NEEDED = {
    "": ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality", "PatientID"),
    "SEG": (
        "SegmentSequence",
        "PerFrameFunctionalGroupsSequence",
        "NumberOfFrames",
        "FrameOfReferenceUID",
        "PixelData",
    ),
    "SR": ("ContentSequence", "CompletionFlag", "VerificationFlag", "CurrentRequestedProcedureEvidenceSequence"),
    "KO": ("ContentSequence", "ConceptNameCodeSequence", "CurrentRequestedProcedureEvidenceSequence"),
    "OT": ("Rows", "Columns", "PixelData", "ConversionType", "PhotometricInterpretation"),
}
"""Attributes that must hold a value (type 1, and Patient ID, without which no archive can file the object), for
every object and by modality (PS3.3 A.51, A.35.13, A.35.4, A.8.1)."""

PRESENT = ("PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber", "StudyID")
"""Attributes that must be there, with or without a value (type 2)."""

NARRATIVE_VALUE_TYPE = "TX"
WITHHELD = "(withheld)"
SHORTEST_WITHHELD = 3


def find_faults(
    findings: Findings,
    contents: Mapping[str, bytes],
    masks: Mapping[str, npt.NDArray[Any]] | None,
    former_oru: bytes | None = None,
) -> tuple[str, ...]:
    """Every reason why a result must not be released, one sentence each, the artifact's name first.

    `contents` are the rendered bytes by artifact name, `masks` the model's masks `(z, y, x)`. A judge that fails
    on an artifact is a fault of that artifact. `former_oru` is the message of the revision that is replaced. Names
    and ids of the patient are taken out of what judges say.
    """
    faults = list(check_consistency(findings, contents, masks, former_oru))
    datasets: dict[str, Dataset] = {}
    for name, data in contents.items():
        faults += _judge(name, partial(_check_size, name, data))
        faults += _judge(name, partial(_JUDGES.get(name.rpartition(".")[2], _pass), name, data, datasets))
    faults += _judge("seg.dcm, sr.dcm, key images", partial(_check_references, datasets))
    return tuple(dict.fromkeys(_withhold(fault, findings) for fault in faults))


def _judge(name: str, check: Callable[[], list[str]]) -> list[str]:
    """What a judge says, each sentence led by the artifact; if it fails, how."""
    try:
        return [f"{name}: {words}" for words in check()]
    except Exception as error:
        return [f"{name}: cannot be judged ({type(error).__name__}: {_shorten(str(error))})"]


def _shorten(words: str) -> str:
    return words if len(words) <= 200 else f"{words[:200]}..."


def _withhold(fault: str, findings: Findings) -> str:
    """The sentence without the patient's names, ids and birth date, and the order's numbers."""
    patient, order = findings.patient, findings.context.order
    given = [patient.patient_id, *re.split(r"[\^= ]+", patient.name), findings.accession_number]
    given += [order.placer_order_number, order.filler_order_number] if order else []
    given += [f"{patient.birth_date:%Y%m%d}", str(patient.birth_date)] if patient.birth_date else []
    for words in sorted({w for w in given if len(w) >= SHORTEST_WITHHELD}, key=len, reverse=True):
        fault = re.sub(rf"(?<!\w){re.escape(words)}(?!\w)", WITHHELD, fault)
    return fault


def _check_size(name: str, data: bytes) -> list[str]:
    limit = DICOM_MAX_BYTES if name.endswith(".dcm") else TEXT_MAX_BYTES
    if not data:
        return ["is empty"]
    return [f"holds {len(data)} bytes, {limit} are allowed"] if len(data) > limit else []


def _pass(name: str, data: bytes, datasets: dict[str, Dataset]) -> list[str]:
    return []


def _judge_dicom(name: str, data: bytes, datasets: dict[str, Dataset]) -> list[str]:
    """PS3.10 file with a matching meta header, the attributes without which it cannot be filed, valid UIDs."""
    dataset = pydicom.dcmread(BytesIO(data))
    datasets[name] = dataset
    words = [f"{uid.keyword} is not a valid UID" for uid in _find_uids(dataset) if not _is_valid_uid(str(uid.value))]
    for meta, keyword in (("MediaStorageSOPClassUID", "SOPClassUID"), ("MediaStorageSOPInstanceUID", "SOPInstanceUID")):
        if dataset.file_meta.get(meta) != dataset.get(keyword):
            words.append(f"{meta} of the file is not {keyword} of the dataset")
    modality = str(dataset.get("Modality", ""))
    for keyword in (*NEEDED[""], *NEEDED.get(modality, ())):
        if dataset.get(keyword) in (None, ""):
            words.append(f"{keyword} has no value")
    words += [f"{keyword} is missing" for keyword in PRESENT if keyword not in dataset]
    return words + _check_pixels(dataset)


def _find_uids(dataset: Dataset) -> Iterator[pydicom.DataElement]:
    """Every element of type UI at any depth."""
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                yield from _find_uids(item)
        elif element.VR == "UI" and element.value:
            yield element


def _is_valid_uid(value: str) -> bool:
    return UID(value).is_valid and len(value) <= 64


def _check_pixels(dataset: Dataset) -> list[str]:
    """PS3.5 8: as many bytes as the matrix says, padded to an even number."""
    if "PixelData" not in dataset:
        return []
    voxels = int(dataset.Rows) * int(dataset.Columns) * int(dataset.get("NumberOfFrames", 1) or 1)
    bits = voxels * int(dataset.get("SamplesPerPixel", 1)) * int(dataset.BitsAllocated)
    expected = (bits + 7) // 8
    expected += expected % 2
    found = len(dataset.PixelData)
    return [] if found == expected else [f"PixelData holds {found} bytes, its matrix needs {expected}"]


def _check_references(datasets: Mapping[str, Dataset]) -> list[str]:
    """One study; no instance or series UID twice; a reference among our own objects names the class it has."""
    words = []
    if len({str(d.get("StudyInstanceUID", "")) for d in datasets.values()}) > 1:
        words.append("belong to different studies")
    if len({str(d.get("PatientID", "")) for d in datasets.values()}) > 1:
        words.append("belong to different patients")
    instances = [str(d.get("SOPInstanceUID", "")) for d in datasets.values()]
    if len(set(instances)) < len(instances):
        words.append("share a SOP Instance UID")
    classes = {str(d.get("SOPInstanceUID", "")): str(d.get("SOPClassUID", "")) for d in datasets.values()}
    for dataset in datasets.values():
        for item in _find_references(dataset):
            uid, stated = str(item.ReferencedSOPInstanceUID), str(item.get("ReferencedSOPClassUID", ""))
            if classes.get(uid, stated) != stated:
                words.append(f"a reference to {uid} states another SOP Class than the object has")
    return words


def _find_references(dataset: Dataset) -> Iterator[Dataset]:
    """Every item at any depth that references an instance."""
    if "ReferencedSOPInstanceUID" in dataset:
        yield dataset
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                yield from _find_references(item)


def _judge_bundle(name: str, data: bytes, datasets: dict[str, Dataset]) -> list[str]:
    """Strict R4, and what a transaction needs."""
    return [*check_bundle(json.loads(data))]


def _judge_oru(name: str, data: bytes, datasets: dict[str, Dataset]) -> list[str]:
    """HL7 v2.5.1 structure, groups, cardinality, datatypes and lengths by hl7apy's strict validation.

    hl7apy needs milliseconds for each segment, so that of narrative lines that are alike but for their number
    and their words, it sees the first and the longest.
    """
    text = data.decode("utf-8")
    words = [f"holds U+{ord(c):04X}, which ends or frames messages" for c in "\n\x0b\x1c" if c in text]
    if words:
        return words
    thinned = _thin(text.split("\r"))
    message = parse_message("\r".join(thinned), validation_level=VALIDATION_LEVEL.STRICT, find_groups=True)
    if message.version != "2.5.1":
        return [f"is version {message.version}, not 2.5.1"]
    return [] if message.validate() else ["does not validate as ORU^R01 of 2.5.1"]


def _thin(lines: list[str]) -> list[str]:
    """Of TX lines that differ only in OBX-1, OBX-4 and OBX-5: the first, and the longest in its place."""
    kept: dict[tuple[str, ...], str] = {}
    for line in lines:
        fields = line.split("|")
        text = fields[0] == "OBX" and len(fields) > 5 and fields[2] == NARRATIVE_VALUE_TYPE
        shape = ("OBX", *fields[2:4], *fields[6:]) if text else (line,)
        kept[shape] = max(kept.get(shape, ""), line, key=len)
    return list(kept.values())


def _judge_png(name: str, data: bytes, datasets: dict[str, Dataset]) -> list[str]:
    with Image.open(BytesIO(data)) as image:
        return [] if image.format == "PNG" else [f"is {image.format}, not PNG"]


def _judge_text(name: str, data: bytes, datasets: dict[str, Dataset]) -> list[str]:
    """UTF-8 without control characters."""
    controls = re.search("[\x00-\x08\x0b-\x1f\x7f]", data.decode("utf-8"))
    return [f"holds the control character U+{ord(controls[0]):04X}"] if controls else []


def _judge_html(name: str, data: bytes, datasets: dict[str, Dataset]) -> list[str]:
    """Like text; runs nothing and loads nothing."""
    words = _judge_text(name, data, datasets)
    page = data.decode("utf-8")
    if active := re.search(r"<(script|iframe|object|embed|link|img|form)\b|\son\w+\s*=\s*[\"'][^<]*>", page, re.I):
        words.append(f"holds <{active[1] or 'an event handler'}>, and may hold neither script nor links elsewhere")
    return words


_JUDGES: Mapping[str, Callable[[str, bytes, dict[str, Dataset]], list[str]]] = {
    "dcm": _judge_dicom,
    "json": _judge_bundle,
    "hl7": _judge_oru,
    "png": _judge_png,
    "txt": _judge_text,
    "html": _judge_html,
}
