"""Whether every rendering of a result says what the findings say: the bytes are read back and compared.

It shares no code with the mappings that render, so that a slip in one of them cannot hide in the check of it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy.typing as npt
from pydicom.dataset import Dataset

from mappings.model.findings import Findings
from mappings.outputs.read_bundle import BUNDLE, check_bundle_agrees, read_conclusion
from mappings.outputs.read_dicom import find_references, read_dataset
from mappings.outputs.read_facts import squeeze
from mappings.outputs.read_impression import check_impression
from mappings.outputs.read_key_images import FOLDER, check_key_image, key_image_names
from mappings.outputs.read_oru import ORU, check_oru, read_impression
from mappings.outputs.read_rejection_note import NOTE, check_rejection_note, rejected_uids
from mappings.outputs.read_report_html import HTML, check_report_html
from mappings.outputs.read_report_text import TEXT, check_report_text
from mappings.outputs.read_seg import check_seg, read_frames
from mappings.outputs.read_sr import check_sr, evidence_of

SEG, SR = "seg.dcm", "sr.dcm"
Masks = Mapping[str, npt.NDArray[Any]]


def check_consistency(
    findings: Findings, contents: Mapping[str, bytes], masks: Masks | None, former_oru: bytes | None = None
) -> tuple[str, ...]:
    """Every disagreement between the renderings and the findings, one sentence each; empty if there is none.

    `contents` are the rendered bytes by artifact name, `masks` the model's masks `(z, y, x)` by name, where the
    voxels of the SEG are to be compared, `former_oru` the message of the revision that is replaced. A sentence names
    the artifact, the finding, what differs, and what was expected and found; values that name a patient or an order
    are withheld.
    """
    wanted = expected_names(findings)
    messages = [f"{name}: artifact: expected one, found none" for name in wanted if name not in contents]
    known = {*wanted, *(f"{FOLDER}/{name}.png" for name in key_image_names(findings))}
    messages += [f"{name}: artifact: expected none of this name, found one" for name in contents if name not in known]
    datasets, unreadable = _read_datasets({name: contents[name] for name in wanted if name in contents})
    messages += unreadable
    for name in wanted:
        if name in datasets:
            messages += _attempt(name, partial(_check_dicom, name, findings, datasets, contents, masks))
        elif name in contents and name in _TEXT_CHECKS:
            messages += _attempt(name, partial(_TEXT_CHECKS[name], findings, contents))
        elif name in contents and name == ORU:
            messages += _attempt(name, partial(_check_oru, findings, contents, former_oru))
    return tuple(messages)


def expected_names(findings: Findings) -> tuple[str, ...]:
    """The artifacts that every result must have; a SEG only where there are segments, a rejection note only where a
    revision replaces objects of another."""
    images = [f"{FOLDER}/{name}.dcm" for name in key_image_names(findings)]
    note = [NOTE] if rejected_uids(findings) else []
    return (*([SEG] if findings.segments else []), SR, *images, *note, ORU, BUNDLE, TEXT, HTML)


def _attempt(name: str, check: Callable[[], list[str]]) -> list[str]:
    """What `check` says; where it fails, that the artifact cannot be read. The error's words may quote patient
    data, so that only its type is told."""
    try:
        return check()
    except Exception as error:
        return [f"{name}: artifact: expected to be readable, found {type(error).__name__} while reading it"]


def _read_datasets(contents: Mapping[str, bytes]) -> tuple[dict[str, Dataset], list[str]]:
    datasets: dict[str, Dataset] = {}
    messages: list[str] = []

    def read(name: str, data: bytes) -> list[str]:
        datasets[name] = read_dataset(data)
        return []

    for name, data in contents.items():
        if name.endswith(".dcm"):
            messages += _attempt(name, partial(read, name, data))
    return datasets, messages


def _check_dicom(
    name: str, findings: Findings, datasets: Mapping[str, Dataset], contents: Mapping[str, bytes], masks: Masks | None
) -> list[str]:
    dataset = datasets[name]
    if name == SEG:
        return check_seg(dataset, findings, masks)
    if name == SR:
        return check_sr(dataset, findings, _segment_sources(datasets.get(SEG)))
    if name == NOTE:
        return check_rejection_note(dataset, findings)
    image = name.removeprefix(f"{FOLDER}/").removesuffix(".dcm")
    messages = check_key_image(dataset, image, findings, contents.get(f"{FOLDER}/{image}.png"))
    if SR in datasets:
        evidence = evidence_of(datasets[SR])
        strange = [uid for uid in find_references(dataset) if uid not in evidence]
        messages += [f"{name}: {image}: source image: expected one that {SR} lists, found '{u}'" for u in strange]
    return messages


def _segment_sources(seg: Dataset | None) -> dict[int, set[str]] | None:
    """The instances that the SEG's frames were drawn on, by segment."""
    if seg is None:
        return None
    sources: dict[int, set[str]] = {}
    for frame in read_frames(seg):
        sources.setdefault(frame.segment, set()).add(frame.source_uid)
    return sources


def _check_oru(findings: Findings, contents: Mapping[str, bytes], former: bytes | None) -> list[str]:
    text = contents[TEXT].decode("utf-8") if TEXT in contents else None
    impression = read_impression(contents[ORU])
    messages = check_oru(contents[ORU], findings, text, former) + check_impression(ORU, impression, findings)
    if BUNDLE in contents and squeeze(read_conclusion(contents[BUNDLE])) != squeeze(impression):
        messages.append(f"{ORU}: message: impression: expected the conclusion of {BUNDLE}, found other words")
    return messages


_TEXT_CHECKS: Mapping[str, Callable[[Findings, Mapping[str, bytes]], list[str]]] = {
    BUNDLE: lambda findings, contents: check_bundle_agrees(contents[BUNDLE], findings, contents),
    TEXT: lambda findings, contents: check_report_text(contents[TEXT], findings),
    HTML: lambda findings, contents: check_report_html(contents[HTML], findings),
}
