"""Everything that is rendered from one `Findings`, as named bytes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import tzinfo
from typing import Any

import jinja2
import numpy as np
from pydicom.dataset import Dataset

from mappings.model.findings import Findings
from mappings.model.protocol import Protocol
from mappings.outputs.dicom_header import write_dicom
from mappings.outputs.findings_to_bundle import findings_to_bundle
from mappings.outputs.findings_to_draft import findings_to_draft
from mappings.outputs.findings_to_key_images import findings_to_key_images, key_image_to_sc
from mappings.outputs.findings_to_oru import findings_to_oru
from mappings.outputs.findings_to_rejection_note import findings_to_rejection_note
from mappings.outputs.findings_to_seg import findings_to_seg
from mappings.outputs.findings_to_sr import findings_to_sr
from middleware.intake.images import RoleImages

Masks = Mapping[str, np.ndarray[Any, np.dtype[np.uint8]]]

DICOM = "application/dicom"


@dataclass(frozen=True)
class Artifact:
    """One rendered artifact. `kind` is the name that a protocol's outputs use; `name` is its file name."""

    name: str
    kind: str
    media_type: str
    data: bytes
    sop_instance_uid: str = ""


@dataclass(frozen=True)
class Addresses:
    """Who sends to whom in HL7, the zone of its times, and whether FHIR references of the context are valid at
    the EHR that gets the result (`ehr_gave_context`); otherwise patient and order are named by identifier."""

    sending_application: str
    sending_facility: str
    receiving_application: str
    receiving_facility: str
    processing_id: str
    zone: tzinfo
    ehr_gave_context: bool = True


def render_all(
    findings: Findings,
    protocol: Protocol,
    masks: Masks,
    images: RoleImages,
    environment: jinja2.Environment,
    addresses: Addresses,
    former_oru: bytes | None = None,
) -> list[Artifact]:
    """Every artifact of a result, in the order in which a destination should get them (SEG before the SR that
    refers to it, the rejection of what they replace last). `former_oru` is the message of the revision that this one
    replaces. The same arguments give the same bytes."""
    reference = images.sources[protocol.measure.reference_role]
    read = [dataset for datasets in images.sources.values() for dataset in datasets]
    draft = findings_to_draft(findings, environment, protocol.outputs.template)
    seg = findings_to_seg(findings, masks, reference)
    sr = findings_to_sr(findings, seg, read)
    artifacts = [*([_dicom("seg.dcm", "seg", seg)] if seg is not None else []), _dicom("sr.dcm", "sr", sr)]
    by_uid = {str(dataset.SOPInstanceUID): dataset for dataset in reference}
    for image in findings_to_key_images(findings, masks, images.volumes):
        secondary = key_image_to_sc(findings, image, by_uid[image.source_sop_uid])
        artifacts.append(Artifact(f"key-images/{image.name}.png", "key_image_png", "image/png", image.png))
        artifacts.append(_dicom(f"key-images/{image.name}.dcm", "key_images", secondary))
    note = findings_to_rejection_note(findings, reference)
    artifacts += [_dicom("rejection.dcm", "rejection_note", note)] if note is not None else []
    oru = findings_to_oru(
        findings,
        text=draft.text,
        sending_application=addresses.sending_application,
        sending_facility=addresses.sending_facility,
        receiving_application=addresses.receiving_application,
        receiving_facility=addresses.receiving_facility,
        processing_id=addresses.processing_id,
        utc_offset=findings.created_at.astimezone(addresses.zone).utcoffset(),
        procedure=protocol.procedure,
        former=former_oru,
    )
    bundle = findings_to_bundle(
        findings, html=draft.html, text=draft.text, procedure=protocol.procedure, same_server=addresses.ehr_gave_context
    )
    return [
        *artifacts,
        Artifact("oru.hl7", "oru", "x-application/hl7-v2+er7", oru),
        Artifact("fhir-bundle.json", "fhir_bundle", "application/fhir+json", _json_bytes(bundle)),
        Artifact("report.txt", "report_text", "text/plain; charset=utf-8", draft.text.encode()),
        Artifact("report.html", "report_html", "text/html; charset=utf-8", draft.html.encode()),
    ]


def _dicom(name: str, kind: str, dataset: Dataset) -> Artifact:
    return Artifact(name, kind, DICOM, write_dicom(dataset), str(dataset.SOPInstanceUID))


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
