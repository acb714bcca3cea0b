"""The FHIR Bundle: strict R4, complete references, conditional entries, and what blank or hostile input does."""

import base64
import dataclasses
import hashlib
import json
from datetime import UTC, date, datetime
from typing import Any

import pytest

from mappings.model import codes
from mappings.model.codes import Code
from mappings.model.context import ClinicalContext
from mappings.model.findings import Blank, Findings
from mappings.model.study import PatientIdentity
from mappings.outputs.findings_to_bundle import check_bundle, findings_to_bundle
from tests.builders import build_context, build_findings, build_gland, build_lesion

HOSTILE = "<script>alert(1)</script>{{7*7}}\x00\x07\r\n|,$\\ \ud800"
HTML = "<!DOCTYPE html><p>Prüfung</p>"
TEXT = "Prüfung\n"


def render(findings: Findings | None = None, **options: Any) -> dict[str, Any]:
    return findings_to_bundle(findings or build_findings(), html=HTML, text=TEXT, **options)


def resources(bundle: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [e["resource"] for e in bundle["entry"] if e["resource"]["resourceType"] == kind]


def only(bundle: dict[str, Any], kind: str) -> dict[str, Any]:
    (resource,) = resources(bundle, kind)
    return resource


def observation(bundle: dict[str, Any], uid: str) -> dict[str, Any]:
    value = f"urn:oid:{uid}"
    return next(o for o in resources(bundle, "Observation") if o["identifier"][0]["value"] == value)


def component(resource: dict[str, Any], key: str) -> dict[str, Any]:
    def keys(part: dict[str, Any]) -> set[str]:
        return {c["code"] for c in part["code"].get("coding", []) if c["system"] == "urn:wetread:codes"}

    return next(part for part in resource["component"] if key in keys(part))


def test_the_default_result_is_strict_r4() -> None:
    bundle = render()
    assert check_bundle(bundle) == ()
    kinds = [e["resource"]["resourceType"] for e in bundle["entry"]]
    assert sorted(kinds) == [
        "Device",
        "DiagnosticReport",
        "ImagingStudy",
        *["Observation"] * 5,
        "Provenance",
    ]
    assert json.loads(json.dumps(bundle)) == bundle


def test_the_check_notices_each_kind_of_fault() -> None:
    bundle = render()
    assert any("status" in p for p in _broken(bundle, lambda b: only(b, "DiagnosticReport").pop("status")))
    assert any("foo" in p for p in _broken(bundle, lambda b: only(b, "Device").update(foo=1)))
    assert any("not conditional" in p for p in _broken(bundle, lambda b: b["entry"][0]["request"].pop("ifNoneExist")))
    assert any("not an entry" in p for p in _broken(bundle, lambda b: b["entry"].pop(0)))
    assert any("two entries" in p for p in _broken(bundle, lambda b: b["entry"].append(b["entry"][0])))


def _broken(bundle: dict[str, Any], damage: Any) -> tuple[str, ...]:
    copy = json.loads(json.dumps(bundle))
    damage(copy)
    return check_bundle(copy)


def test_report_fields() -> None:
    findings = build_findings()
    report = only(render(findings), "DiagnosticReport")
    assert report["identifier"] == [
        {"system": "urn:wetread:report", "value": f"{findings.study_instance_uid}:prostate_mri"}
    ]
    assert report["status"] == "preliminary"
    assert report["category"][0]["coding"][0] == {
        "system": "http://terminology.hl7.org/CodeSystem/v2-0074",
        "code": "RAD",
    }
    assert report["subject"] == {"reference": "Patient/p1"}
    assert report["basedOn"] == [{"reference": "ServiceRequest/s1"}]
    assert report["code"]["text"] == "MR Prostate"
    assert report["code"]["coding"][0]["system"] == "http://loinc.org"
    assert report["conclusionCode"][0]["coding"][0]["code"] == "RID50292"
    assert report["conclusion"].startswith("AI-PROPOSED, UNVERIFIED, PRELIMINARY")
    assert "Left blank: DCE" in report["conclusion"]


def test_presented_forms_carry_size_and_hash() -> None:
    forms = only(render(), "DiagnosticReport")["presentedForm"]
    assert [form["contentType"] for form in forms] == ["text/html", "text/plain"]
    for form, content in zip(forms, (HTML, TEXT), strict=True):
        data = base64.b64decode(form["data"])
        assert data.decode() == content
        assert form["size"] == len(data)
        assert base64.b64decode(form["hash"]) == hashlib.sha1(data).digest()


def test_every_value_is_there_with_ucum_and_side() -> None:
    findings = build_findings()
    bundle = render(findings)
    for finding in findings.findings:
        parent = observation(bundle, finding.tracking_uid)
        for m in finding.measurements:
            if m.key == "psa_density":
                continue
            quantity = component(parent, m.key)["valueQuantity"]
            assert quantity["value"] == float(m.text)
            assert (quantity["system"], quantity["code"]) == ("http://unitsofmeasure.org", m.unit.value)
    right = observation(bundle, findings.lesions[0].tracking_uid)
    assert component(right, "side")["valueCodeableConcept"]["coding"][0]["code"] == codes.RIGHT.value
    assert right["bodySite"]["coding"][0]["code"] == "716921007"
    assert right["bodySite"]["text"] == "right, peripheral zone of the prostate, mid"
    assert component(right, "pirads")["valueCodeableConcept"]["coding"][0]["code"] == "RID50299"
    assert component(right, "pirads.DCE")["valueCodeableConcept"]["text"] == "not acquired"
    assert any("DWI is dominant" in note["text"] for note in right["note"])


def test_density_is_derived_from_the_psa() -> None:
    bundle = render()
    density = next(o for o in resources(bundle, "Observation") if o["code"]["text"] == "PSA density")
    assert density["valueQuantity"]["value"] == 0.26
    assert {"reference": "Observation/psa1"} in density["derivedFrom"]
    gland = observation(bundle, build_gland().tracking_uid)
    url = next(e["fullUrl"] for e in bundle["entry"] if e["resource"] is density)
    assert gland["hasMember"] == [{"reference": url}]


def test_a_blank_density_says_why_under_the_same_identifier() -> None:
    blanks = (Blank("PSA density", "the latest PSA is 500 days old"),)
    findings = build_findings(findings=(build_gland(None),), assessments=(), psa=None, blanks=blanks)
    before, after = (
        next(o for o in resources(b, "Observation") if o["code"]["text"] == "PSA density")
        for b in (render(), render(findings))
    )
    assert after["identifier"] == before["identifier"]
    assert "valueQuantity" not in after
    assert after["dataAbsentReason"]["text"] == "the latest PSA is 500 days old"
    assert check_bundle(render(findings)) == ()


def test_device_study_and_provenance() -> None:
    findings = build_findings()
    bundle = render(findings)
    device = only(bundle, "Device")
    assert (device["deviceName"][0]["name"], device["version"][0]["value"], device["manufacturer"]) == (
        "prostate_reference",
        "1",
        "Wetread project",
    )
    study = only(bundle, "ImagingStudy")
    assert study["identifier"][0] == {
        "system": "urn:dicom:uid",
        "value": f"urn:oid:{findings.study_instance_uid}",
    }
    provenance = only(bundle, "Provenance")
    urls = {e["resource"]["resourceType"]: e["fullUrl"] for e in bundle["entry"]}
    assert provenance["target"][0] == {"reference": urls["DiagnosticReport"]}
    assert provenance["agent"][0]["who"] == {"reference": urls["Device"]}
    assert provenance["recorded"] == "2026-03-04T10:30:00Z"
    inputs = [entity["what"]["reference"] for entity in provenance["entity"]]
    assert inputs == [urls["ImagingStudy"], "ServiceRequest/s1", "Observation/psa1"]


def test_a_revision_updates_and_leaves_its_own_provenance() -> None:
    first, second = render(), render(build_findings(revision=2, status="amended"))

    def requests(bundle: dict[str, Any]) -> list[dict[str, Any]]:
        return [e["request"] for e in bundle["entry"] if e["resource"]["resourceType"] != "Provenance"]

    assert requests(first) == requests(second)
    assert first["entry"][-1]["request"]["ifNoneExist"] != second["entry"][-1]["request"]["ifNoneExist"]
    assert render() == first
    assert {o["status"] for o in resources(second, "Observation")} == {"amended"}


@pytest.mark.parametrize("status", ["preliminary", "final", "amended", "corrected", "entered-in-error"])
def test_every_status_is_strict_r4(status: str) -> None:
    assert check_bundle(render(build_findings(status=status))) == ()


def test_without_an_ehr_patient_the_subject_is_logical() -> None:
    findings = build_findings(
        context=ClinicalContext("none"), patient=PatientIdentity("TEST-001", "HOSPITAL"), psa=None
    )
    bundle = render(findings)
    assert check_bundle(bundle) == ()
    subject = only(bundle, "DiagnosticReport")["subject"]
    assert subject["type"] == "Patient"
    assert subject["identifier"]["value"] == "TEST-001"
    assert subject["identifier"]["assigner"] == {"display": "HOSPITAL"}
    assert only(bundle, "DiagnosticReport")["basedOn"][0]["identifier"]["value"] == "ACC-1"
    assert only(bundle, "DiagnosticReport")["code"]["coding"][0]["code"] == "18748-4"


def test_another_server_gets_no_reference_into_this_one() -> None:
    written = json.dumps(render(same_server=False))
    assert '"reference": "Patient/' not in written
    assert '"reference": "ServiceRequest/' not in written
    assert '"reference": "Observation/' not in written
    assert "Observation/psa1 of ehr" in written


def test_nothing_known_is_still_strict_r4() -> None:
    findings = build_findings(
        lesions=(),
        findings=(),
        context=ClinicalContext("none"),
        patient=PatientIdentity("P"),
        psa=None,
        study_date=None,
        study_description="",
        accession_number="",
        blanks=tuple(Blank(name, "not found") for name in ("PSA", "gland")),
    )
    bundle = render(findings)
    assert check_bundle(bundle) == ()
    assert "basedOn" not in only(bundle, "DiagnosticReport")
    assert resources(bundle, "Observation") == []
    assert "No lesion was proposed by the model." in only(bundle, "DiagnosticReport")["conclusion"]


def test_hostile_strings_are_strict_r4_and_printable() -> None:
    order = build_context().order
    assert order is not None
    lesion = dataclasses.replace(build_lesion(), title=HOSTILE, notes=(HOSTILE, "X" * 10_000))
    findings = build_findings(
        lesions=(lesion,),
        context=build_context(
            order=dataclasses.replace(order, reason=HOSTILE, code=Code("1|2", "L", HOSTILE), code_system_url="")
        ),
        protocol_name="a|b,c$d\\e f&g",
        study_description=HOSTILE,
        created_at=datetime(2026, 3, 4, 10, 30, 0, 123456, tzinfo=UTC),
        study_date=date(1999, 1, 1),
    )
    bundle = findings_to_bundle(findings, html=HOSTILE, text=HOSTILE)
    assert check_bundle(bundle) == ()
    assert only(bundle, "ImagingStudy")["description"].startswith("<script>alert(1)</script>{{7*7}}<U+0000>")
    json.dumps(bundle).encode()
    url = next(e["request"]["url"] for e in bundle["entry"] if e["request"]["url"].startswith("DiagnosticReport"))
    assert url.endswith("a%5C%7Cb%5C%2Cc%5C%24d%5C%5Ce%20f%26g")
