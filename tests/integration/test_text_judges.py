"""The text renderings before judges that did not write them: HAPI FHIR for the Bundle, two HL7 parsers for the
ORU, a browser for the HTML draft. The real server of the simulator hospital; its absence is a failure."""

import dataclasses
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jinja2
import pytest

from deploy.hospital.ehr import start_hapi
from mappings.inputs.fhir_to_context import fhir_to_context, latest_psa
from mappings.model.findings import Blank, Findings
from mappings.model.study import PatientIdentity
from mappings.outputs.findings_to_bundle import findings_to_bundle
from mappings.outputs.findings_to_draft import Draft, draft_environment, findings_to_draft
from tests.builders import build_context, build_findings, build_gland, build_lesion
from tests.comparisons import build_ambiguous, build_compared

TEMPLATES = Path(__file__).parents[2] / "templates" / "report"
CHART: list[dict[str, Any]] = [
    {
        "resourceType": "Patient",
        "id": "p1",
        "identifier": [{"system": "urn:oid:1.2.3.4.5", "value": "TEST-001"}],
        "birthDate": "1961-05-06",
        "gender": "male",
    },
    {
        "resourceType": "ServiceRequest",
        "id": "s1",
        "status": "active",
        "intent": "order",
        "subject": {"reference": "Patient/p1"},
        "identifier": [
            {
                "type": {"coding": [{"system": "http://terminology.hl7.org/CodeSystem/v2-0203", "code": "ACSN"}]},
                "value": "ACC-1",
            }
        ],
        "code": {"text": "MR Prostate"},
    },
    {
        "resourceType": "Observation",
        "id": "psa1",
        "status": "final",
        "subject": {"reference": "Patient/p1"},
        "code": {"coding": [{"system": "http://loinc.org", "code": "2857-1"}]},
        "effectiveDateTime": "2026-02-01",
        "valueQuantity": {
            "value": 13,
            "unit": "ng/mL",
            "system": "http://unitsofmeasure.org",
            "code": "ng/mL",
        },
    },
]


@pytest.fixture(scope="module")
def ehr(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """HAPI with the chart of one patient."""
    with start_hapi(tmp_path_factory.mktemp("ehr")) as server:
        headers = {"Content-Type": "application/fhir+json"}
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False, headers=headers) as client:
            for resource in CHART:
                client.put(f"/{resource['resourceType']}/{resource['id']}", json=resource).raise_for_status()
            yield client


def draft(findings: Findings) -> Draft:
    return findings_to_draft(findings, draft_environment(jinja2.FileSystemLoader(TEMPLATES)), "prostate_mri")


def render(findings: Findings, **options: Any) -> dict[str, Any]:
    page = draft(findings)
    return findings_to_bundle(findings, html=page.html, text=page.text, **options)


def send(ehr: httpx.Client, bundle: dict[str, Any]) -> list[str]:
    response = ehr.post("", json=bundle)
    assert response.status_code == 200, response.text
    return [entry["response"]["status"][:3] for entry in response.json()["entry"]]


def found(ehr: httpx.Client, kind: str, **search: str) -> list[dict[str, Any]]:
    reply = ehr.get(f"/{kind}", params={"_count": "200", **search}, headers={"Cache-Control": "no-cache"})
    reply.raise_for_status()
    return [entry["resource"] for entry in reply.json().get("entry", [])]


def errors(ehr: httpx.Client, resource: dict[str, Any]) -> list[str]:
    """What `$validate` calls an error."""
    reply = ehr.post(f"/{resource['resourceType']}/$validate", json=resource)
    issues = reply.json()["issue"]
    assert issues, "the judge said nothing at all"
    return [i["diagnostics"] for i in issues if i["severity"] in ("error", "fatal")]


def replace_study(findings: Findings, uid: str) -> Findings:
    return dataclasses.replace(findings, study_instance_uid=uid)


VARIANTS = {
    "default": build_findings(),
    "no EHR patient": build_findings(
        context=build_context(patient=None, order=None),
        psa=None,
        patient=PatientIdentity("TEST-002", "HOSPITAL"),
        study_instance_uid="2.25.2",
    ),
    "no lesions, no PSA": build_findings(
        findings=(build_gland(None),),
        assessments=(),
        psa=None,
        blanks=(Blank("PSA density", "no PSA in the EHR"),),
        study_instance_uid="2.25.3",
    ),
    "compared": replace_study(build_compared(), "2.25.8"),
    "unsure what it was": replace_study(build_ambiguous(), "2.25.9"),
    "hostile": build_findings(
        lesions=(dataclasses.replace(build_lesion(), title="<script>{{7*7}}\x00\r\n|", notes=("X" * 10_000,)),),
        study_description="a|b,c$d\\e <&> Zürich 山田",
        protocol_name="a|b,c$d\\e f&g",
        study_instance_uid="2.25.4",
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_hapi_validates_every_resource_without_errors(ehr: httpx.Client, name: str) -> None:
    for entry in render(VARIANTS[name])["entry"]:
        assert errors(ehr, entry["resource"]) == [], entry["resource"]["resourceType"]


def test_hapi_notices_a_resource_that_is_wrong(ehr: httpx.Client) -> None:
    assert errors(ehr, {"resourceType": "Observation", "status": "nonsense", "code": {"text": "x"}})


@pytest.mark.parametrize("name", VARIANTS)
def test_sent_twice_is_stored_once(ehr: httpx.Client, name: str) -> None:
    bundle = render(VARIANTS[name])
    kinds = {entry["resource"]["resourceType"] for entry in bundle["entry"]}
    send(ehr, bundle)
    before = {kind: {r["id"]: r["meta"]["versionId"] for r in found(ehr, kind)} for kind in kinds}
    assert set(send(ehr, bundle)) == {"200"}
    after = {kind: {r["id"]: r["meta"]["versionId"] for r in found(ehr, kind)} for kind in kinds}
    assert after == before


def test_a_revision_replaces_what_was_stored(ehr: httpx.Client) -> None:
    findings = build_findings(study_instance_uid="2.25.5")
    send(ehr, render(findings))
    send(ehr, render(dataclasses.replace(findings, revision=2, status="amended")))
    report = found(ehr, "DiagnosticReport", identifier="urn:wetread:report|2.25.5:prostate_mri")
    assert [r["status"] for r in report] == ["amended"]
    assert report[0]["meta"]["versionId"] == "2"
    provenances = found(ehr, "Provenance", target=f"DiagnosticReport/{report[0]['id']}")
    assert len(provenances) == 2


def test_the_stored_report_leads_to_its_values_and_sources(ehr: httpx.Client) -> None:
    findings = build_findings(study_instance_uid="2.25.6")
    send(ehr, render(findings))
    (report,) = found(ehr, "DiagnosticReport", identifier="urn:wetread:report|2.25.6:prostate_mri")
    assert report["subject"]["reference"] == "Patient/p1"
    gland = next(
        o
        for o in (ehr.get(f"/{r['reference']}").json() for r in report["result"])
        if o["code"]["text"] == "Prostate gland"
    )
    density = ehr.get(f"/{gland['hasMember'][0]['reference']}").json()
    assert density["valueQuantity"]["value"] == 0.26
    assert {"reference": "Observation/psa1"} in density["derivedFrom"]
    study = ehr.get(f"/{report['imagingStudy'][0]['reference']}").json()
    assert study["identifier"][0]["value"] == "urn:oid:2.25.6"


def test_an_imaging_study_that_is_there_is_used(ehr: httpx.Client) -> None:
    known = {
        "resourceType": "ImagingStudy",
        "identifier": [{"system": "urn:dicom:uid", "value": "urn:oid:2.25.7"}],
        "status": "available",
        "subject": {"reference": "Patient/p1"},
    }
    created = ehr.post("/ImagingStudy", json=known)
    send(ehr, render(build_findings(study_instance_uid="2.25.7")))
    (report,) = found(ehr, "DiagnosticReport", identifier="urn:wetread:report|2.25.7:prostate_mri")
    assert report["imagingStudy"] == [{"reference": f"ImagingStudy/{created.json()['id']}"}]


def test_the_context_comes_back_out_of_hapi(ehr: httpx.Client) -> None:
    pages = [ehr.get(f"/{kind}").json() for kind in ("Patient", "ServiceRequest", "Observation")]
    context = fhir_to_context(
        pages, source="ehr", patient_id="TEST-001", patient_issuer="1.2.3.4.5", accession_number="ACC-1"
    )
    findings = build_findings()
    assert context.patient is not None
    assert context.order is not None
    assert (context.patient.reference, context.order.reference) == ("Patient/p1", "ServiceRequest/s1")
    assert findings.study_date is not None
    psa, _ = latest_psa(context, findings.study_date, 365)
    assert psa is not None
    assert (psa.value, psa.reference) == (13.0, "Observation/psa1")


def test_chromium_shows_the_draft_and_runs_nothing(tmp_path: Path) -> None:
    lesion = dataclasses.replace(
        build_lesion(), title="<script>document.title='run'</script><img src=x onerror=\"document.title='run'\">"
    )
    page = tmp_path / "report.html"
    page.write_text(draft(build_findings(lesions=(lesion,))).html)
    switches = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --dump-dom"
    )
    command = ["/usr/bin/chromium", *switches.split(), f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "<title>Prostate MRI, PI-RADS v2.1: preliminary AI draft</title>" in shown
    assert "&lt;script&gt;document.title='run'&lt;/script&gt;" in shown
    assert "<script" not in shown
    assert "<img" not in shown
