"""A whole result rendered with the real renderings, and findings whose places are those of their masks."""

from dataclasses import replace
from datetime import UTC
from functools import cache
from pathlib import Path

import jinja2
import numpy as np
import numpy.typing as npt

from mappings.inputs.dicom_to_study import datasets_to_study
from mappings.model.findings import Finding, Findings, ModelIdentity, RoleChoice
from mappings.model.measurement import Evidence
from mappings.model.protocol import Protocol
from mappings.model.study import Volume
from mappings.outputs.findings_to_draft import draft_environment
from mappings.reading.tensors_to_findings import Reading, tensors_to_findings
from middleware.intake.images import RoleImages
from middleware.intake.protocols import load_protocols
from middleware.release.rendering import Addresses, Masks, render_all
from tests.builders import NOW, T2W_UID, build_context, build_findings, build_masks
from tests.dicom_sources import build_sources, build_volumes

Mask = npt.NDArray[np.uint8]
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
    former_oru: bytes | None = None,
    **headers: object,
) -> dict[str, bytes]:
    """All artifacts of `findings` by name; `headers` change the source images' headers."""
    findings = place_findings(build_findings()) if findings is None else findings
    masks = build_masks() if masks is None else masks
    known = {"template": template, "ehr_gave_context": ehr_gave_context, "former_oru": former_oru}
    return render_result(findings, masks, None, **known, **headers)  # type: ignore[arg-type]


def render_result(
    findings: Findings,
    masks: Masks,
    volumes: dict[str, Volume] | None,
    *,
    template: str = "prostate_mri",
    ehr_gave_context: bool = True,
    former_oru: bytes | None = None,
    **headers: object,
) -> dict[str, bytes]:
    """All artifacts of `findings` by name, on the sources of the shape of `masks`."""
    shape = masks["gland"].shape
    sources = tuple(build_sources(shape, **headers))
    images = RoleImages(build_volumes(shape) if volumes is None else volumes, {"t2w": sources})
    protocol = load_prostate_protocol()
    protocol = replace(protocol, outputs=replace(protocol.outputs, template=template))
    addresses = Addresses("WETREAD", "HOSPITAL", "RIS", "HOSPITAL", "T", UTC, ehr_gave_context)
    environment = draft_environment(jinja2.FileSystemLoader(TEMPLATES))
    return {a.name: a.data for a in render_all(findings, protocol, masks, images, environment, addresses, former_oru)}


def read_random_result(seed: int) -> tuple[Findings, dict[str, Mask], dict[str, Volume]]:
    """What the reading makes of a random answer: up to four lesions anywhere, any scores; now and then no gland,
    no peripheral zone, no PSA, no ADC map or one whose unit is unclear."""
    rng = np.random.default_rng(seed)
    masks, volumes, context = build_masks(), build_volumes(), build_context()
    masks["lesions"] = _draw_lesions(rng, masks["gland"].shape)
    if rng.random() < 0.25:
        masks["gland"][:], masks["zones"][:] = 0, 0
    if rng.random() < 0.25:
        masks["zones"][masks["zones"] == 1] = 0
    if rng.random() < 0.5:
        volumes["adc"] = replace(volumes["adc"], array=volumes["adc"].array * rng.integers(0, 2))
    count = int(masks["lesions"].max())
    scores = rng.integers(1, 6, (count, 4)).astype(np.float32)
    scores[:, 2], scores[:, 3] = rng.choice([0, 1, np.nan], count), rng.random(count)
    sources = build_sources()
    reading = Reading(
        job_id=f"random-{seed}",
        revision=1,
        now=NOW,
        study=datasets_to_study([(str(index), source) for index, source in enumerate(sources)]),
        protocol=load_prostate_protocol(),
        model=ModelIdentity("prostate_reference", "1", "Wetread project"),
        context=context,
        psa=context.labs[0] if rng.random() < 0.7 else None,
        psa_reason="no PSA in the EHR",
        roles=(RoleChoice("t2w", "T2-weighted axial", True, T2W_UID, "4 t2_tse_tra", ("chosen",)),),
        volumes=volumes,
    )
    return tensors_to_findings({**masks, "scores": scores}, reading), masks, volumes


def _draw_lesions(rng: np.random.Generator, shape: tuple[int, ...]) -> Mask:
    """Boxes that may overlap, labelled 1..n without gaps."""
    drawn = np.zeros(shape, np.uint8)
    for label in range(1, int(rng.integers(0, 5)) + 1):
        z, y, x = (int(rng.integers(0, size - 4)) for size in shape)
        depth, height, width = (int(n) for n in rng.integers(1, 5, 3))
        drawn[z : z + depth, y : y + height, x : x + width] = label
    _, labels = np.unique(drawn, return_inverse=True)
    return labels.reshape(shape).astype(np.uint8)
