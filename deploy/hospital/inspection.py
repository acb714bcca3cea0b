"""What the PACS, the EHR and the RIS of the simulator hold after a reading, judged on their side of the wire."""

from dataclasses import dataclass
from typing import Any

import hl7

from connectors.dicomweb.client import DicomwebClient
from connectors.dicomweb.config import DicomwebConfig
from connectors.dicomweb.folder import FolderClient
from connectors.fhir.client import FhirClient
from connectors.fhir.config import FhirConfig
from deploy.hospital.hospital import Hospital
from deploy.hospital.phantom import PhantomSpec, truth

GLAND_TOLERANCE = 0.15
"""The reference model's gland may differ by this share from the phantom's truth; it is no clinical model."""


@dataclass(frozen=True)
class Received:
    """One fact about one system: what it holds, whether that is right, and what was wanted."""

    system: str
    what: str
    right: bool
    wanted: str = ""


async def inspect_end_state(
    hospital: Hospital, study_uid: str, job: dict[str, Any], spec: PhantomSpec | None
) -> list[Received]:
    """Every check, in the order of the flow. `spec` is the phantom whose truth is known, None for a real study."""
    checks = [Received("Wetread", f"job {job['state']}", job["state"] == "released", "; ".join(job["reasons"]))]
    undelivered = [f"{d['artifact_name']} to {d['destination']} {d['state']}" for d in _undelivered(job)]
    total = len(job["deliveries"])
    checks.append(
        Received(
            "Wetread",
            f"{total - len(undelivered)} of {total} deliveries arrived",
            not undelivered and total > 0,
            str(undelivered),
        )
    )
    checks += await _inspect_pacs(hospital, study_uid)
    checks += await _inspect_ehr(hospital, study_uid, spec)
    return [*checks, *_inspect_ris(hospital, study_uid, spec)]


def _undelivered(job: dict[str, Any]) -> list[dict[str, Any]]:
    return [d for d in job["deliveries"] if d["state"] != "delivered"]


async def _inspect_pacs(hospital: Hospital, study_uid: str) -> list[Received]:
    pacs: DicomwebClient | FolderClient
    if hospital.orthanc:
        pacs = DicomwebClient(DicomwebConfig(url=hospital.orthanc.dicomweb_url))
    else:
        pacs = FolderClient(hospital.pacs_folder)
    series = await pacs.search_series(study_uid, include=("Modality", "SeriesDescription"))
    counts: dict[str, int] = {}
    for one in series:
        modality = one["00080060"]["Value"][0]
        uid = one["0020000E"]["Value"][0]
        counts[modality] = counts.get(modality, 0) + len(await pacs.search_instances(study_uid, series_uid=uid))
    await pacs.aclose()
    return [
        Received("PACS", f"{counts.get('SEG', 0)} segmentation (SEG)", counts.get("SEG") == 1, "exactly 1"),
        Received("PACS", f"{counts.get('SR', 0)} structured report (SR)", counts.get("SR") == 1, "exactly 1"),
        Received(
            "PACS", f"{counts.get('OT', 0)} key image(s) (Secondary Capture)", counts.get("OT", 0) >= 1, "1 or more"
        ),
    ]


async def _inspect_ehr(hospital: Hospital, study_uid: str, spec: PhantomSpec | None) -> list[Received]:
    ehr = FhirClient(FhirConfig(url=hospital.ehr.url))
    reports = await ehr.search("DiagnosticReport", {})
    observations = await ehr.search("Observation", {"category": "imaging"})
    await ehr.aclose()
    statuses = ", ".join(r["status"] for r in reports) or "none"
    one = reports[0] if reports else {}
    bound = bool(one.get("subject", {}).get("reference", "").startswith("Patient/")) and bool(one.get("basedOn"))
    checks = [
        Received("EHR", f"{len(reports)} DiagnosticReport, {statuses}", statuses == "preliminary", "1, preliminary"),
        Received(
            "EHR", "report bound to patient and order" if bound else "report not bound", bound, "subject, basedOn"
        ),
        Received("EHR", f"{len(observations)} imaging Observations", len(observations) >= 1, "1 or more"),
        Received("EHR", f"conclusion: {one.get('conclusion', '')[:160]}", bool(one.get("conclusion")), "a conclusion"),
    ]
    return [*checks, *(_judge_gland(observations, spec) if spec else [])]


def _judge_gland(observations: list[dict[str, Any]], spec: PhantomSpec) -> list[Received]:
    """The gland's volume in the EHR against the phantom's truth."""
    wanted = truth(spec).gland_volume_ml
    volumes = [
        component["valueQuantity"]["value"]
        for observation in observations
        for component in observation.get("component", [])
        if component.get("valueQuantity", {}).get("code") == "mL" and component["valueQuantity"]["value"] > 10
    ]
    near = any(abs(v - wanted) <= GLAND_TOLERANCE * wanted for v in volumes)
    shown = ", ".join(f"{v:g}" for v in volumes)
    return [Received("EHR", f"gland volume {shown} mL (truth {wanted:.1f})", near, f"within {GLAND_TOLERANCE:.0%}")]


def _inspect_ris(hospital: Hospital, study_uid: str, spec: PhantomSpec | None) -> list[Received]:
    accepted = hospital.ris.accepted()
    checks = [Received("RIS", f"{len(accepted)} accepted ORU^R01", len(accepted) == 1, "exactly 1")]
    if not accepted:
        return checks
    message = hl7.parse(accepted[0].text.replace("\n", "\r"))
    status = str(message.segment("OBR")[25])
    checks.append(Received("RIS", f"OBR-25 result status {status}", status == "P", "P (preliminary)"))
    named = any(study_uid in str(segment) for segment in message.segments("OBX"))
    checks.append(
        Received("RIS", "study named" if named else "study not named", named, "the StudyInstanceUID in an OBX")
    )
    if spec:
        wanted = {lesion.side for lesion in truth(spec).lesions}
        sides = {side for side in ("right", "left") if _names_side(message, side)}
        checks.append(
            Received("RIS", f"lesion side {', '.join(sorted(sides)) or 'none'}", sides == wanted, str(wanted))
        )
    return checks


def _names_side(message: Any, side: str) -> bool:
    """Whether an OBX codes this laterality (SNOMED CT 24028007 right, 7771000 left)."""
    code = {"right": "24028007", "left": "7771000"}[side]
    return any(str(segment[5]).startswith(f"{code}^") for segment in message.segments("OBX"))
