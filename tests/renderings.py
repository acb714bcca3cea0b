"""A whole result rendered with the real renderings, and findings whose places are those of their masks."""

from dataclasses import replace
from datetime import UTC
from functools import cache
from pathlib import Path

import jinja2
import numpy as np

from mappings.model.findings import Evidence, Finding, Findings
from mappings.model.protocol import Protocol
from mappings.outputs.findings_to_draft import draft_environment
from middleware.intake.images import RoleImages
from middleware.intake.protocols import load_protocols
from middleware.release.rendering import Addresses, Masks, render_all
from tests.builders import build_findings, build_masks
from tests.dicom_sources import build_sources, build_volumes

TEMPLATES = Path(__file__).parents[1] / "templates" / "report"


@cache
def load_prostate_protocol() -> Protocol:
    """The protocol that the project ships."""
    return load_protocols()["prostate_mri"].protocol


def place_findings(findings: Findings, masks: Masks | None = None) -> Findings:
    """`findings` with each centroid and evidence where the masks have the finding, as the reading derives them."""
    masks = build_masks() if masks is None else masks
    return replace(
        findings,
        findings=tuple(_place(finding, masks) for finding in findings.findings),
        procedure=load_prostate_protocol().procedure,
    )


def _place(finding: Finding, masks: Masks) -> Finding:
    mask = masks["gland"] > 0 if finding.tracking_id == "gland" else masks["lesions"] == finding.label
    volume = build_volumes(mask.shape)["t2w"]
    x, y, z = (round(float(v), 1) for v in volume.geometry.to_lps_mm(np.argwhere(mask)).mean(axis=0))
    frame = int(np.argmax(mask.sum(axis=(1, 2))))
    shown = Evidence("t2w", volume.series_instance_uid, volume.sop_instance_uids[frame], frame)
    return replace(finding, centroid_lps_mm=(x, y, z), evidence=(shown,))


def render_contents(
    findings: Findings | None = None,
    *,
    masks: Masks | None = None,
    template: str = "prostate_mri",
    ehr_gave_context: bool = True,
    **headers: object,
) -> dict[str, bytes]:
    """All artifacts of `findings` by name; `headers` change the source images' headers."""
    findings = place_findings(build_findings()) if findings is None else findings
    masks = build_masks() if masks is None else masks
    shape = masks["gland"].shape
    images = RoleImages(build_volumes(shape), {"t2w": tuple(build_sources(shape, **headers))})
    protocol = load_prostate_protocol()
    protocol = replace(protocol, outputs=replace(protocol.outputs, template=template))
    addresses = Addresses("WETREAD", "HOSPITAL", "RIS", "HOSPITAL", "T", UTC, ehr_gave_context)
    environment = draft_environment(jinja2.FileSystemLoader(TEMPLATES))
    return {a.name: a.data for a in render_all(findings, protocol, masks, images, environment, addresses)}
