"""Signed, amended, corrected and withdrawn results before judges that did not write them: dciodvfy, dcmqi and dcmtk for
DICOM, HAPI for FHIR (which is told each revision in turn), hl7apy and python-hl7 for the message."""

import json
import subprocess
from collections.abc import Iterator
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import hl7  # type: ignore[import-untyped,unused-ignore]
import httpx
import pydicom
import pytest
from hl7apy.consts import VALIDATION_LEVEL  # type: ignore[import-untyped]
from hl7apy.parser import parse_message  # type: ignore[import-untyped]

from deploy.hospital.ehr import start_hapi
from tests.integration.test_dicom_judges import BIN, TIMEOUT_S, judge_with_dciodvfy, run
from tests.integration.test_text_judges import CHART, errors, found, send
from tests.revisions import Chain, build_chains, render_chain

CHAINS = build_chains()
JUDGED = ["final", "amended", "corrected", "final, withdrawn", "lesion lost", "no lesion left", "gland rejected"]
IODS = {
    "Segmentation Storage": "Segmentation",
    "Comprehensive 3D SR Storage": "Comprehensive3DSR",
    "Secondary Capture Image Storage": "SCImage",
    "Key Object Selection Document Storage": "KeyObjectSelectionDocument",
}


@cache
def rendered(name: str) -> Chain:
    return render_chain(CHAINS[name])


@pytest.fixture(scope="module")
def ehr(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """HAPI with the chart of one patient."""
    with start_hapi(tmp_path_factory.mktemp("ehr")) as server:
        headers = {"Content-Type": "application/fhir+json"}
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False, headers=headers) as client:
            for resource in CHART:
                client.put(f"/{resource['resourceType']}/{resource['id']}", json=resource).raise_for_status()
            yield client


@pytest.mark.parametrize("name", JUDGED)
def test_dciodvfy_finds_no_error_in_the_last_revision(name: str, tmp_path: Path) -> None:
    contents = rendered(name).contents[-1]
    objects = {key: data for key, data in contents.items() if key.endswith(".dcm")}
    assert "rejection.dcm" in objects
    for data in objects.values():
        kind = pydicom.dcmread(BytesIO(data), stop_before_pixels=True).SOPClassUID.name
        judge_with_dciodvfy(tmp_path, data, IODS[kind])


def test_dciodvfy_would_notice_a_report_that_is_verified_but_not_complete(tmp_path: Path) -> None:
    report = rendered("final").contents[-1]["sr.dcm"].replace(b"COMPLETE", b"PARTIAL ")
    with pytest.raises(AssertionError, match="VERIFIED"):
        judge_with_dciodvfy(tmp_path, report, "Comprehensive3DSR")


@pytest.mark.parametrize("name", ["final", "corrected", "final, withdrawn"])
def test_dcmqi_and_dcmtk_read_the_report_as_the_findings_say(name: str, tmp_path: Path) -> None:
    findings, contents, _ = rendered(name).last
    (tmp_path / "sr.dcm").write_bytes(contents["sr.dcm"])
    run(BIN / "tid1500reader", "--inputDICOM", tmp_path / "sr.dcm", "--outputMetadata", tmp_path / "sr.json")
    report = json.loads((tmp_path / "sr.json").read_text())
    assert report["VerificationFlag"] == ("VERIFIED" if findings.signature else "UNVERIFIED")
    assert {g["TrackingUniqueIdentifier"] for g in report["Measurements"]} >= {
        f.tracking_uid for f in findings.findings
    }
    text = run("/usr/bin/dsrdump", "+Pl", tmp_path / "sr.dcm")
    assert ("Ferrer" in text) or ("Wei" in text)
    assert "Predecessor Docs" in text
    assert [line for line in text.splitlines() if line.startswith(("E:", "F:"))] == []


@pytest.mark.parametrize("name", ["corrected", "withdrawn"])
def test_dcmtk_reads_the_rejection_note(name: str, tmp_path: Path) -> None:
    (tmp_path / "note.dcm").write_bytes(rendered(name).contents[-1]["rejection.dcm"])
    done = subprocess.run(
        ["/usr/bin/dsrdump", tmp_path / "note.dcm"], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Key Object Selection Document" in done.stdout
    assert "Rejected for" in done.stdout


@pytest.mark.parametrize("name", JUDGED)
def test_hl7_parsers_read_the_last_message(name: str) -> None:
    text = rendered(name).contents[-1]["oru.hl7"].decode()
    parsed = parse_message(text, validation_level=VALIDATION_LEVEL.STRICT, find_groups=True)
    assert parsed.validate()
    rows = hl7.parse(text).segments("OBX")
    assert [str(row[1]) for row in rows] == [str(n) for n in range(1, len(rows) + 1)]
    assert {str(row[5]) for row in rows if str(row[11]) == "D"} <= {'""'}


def stored(ehr: httpx.Client, bundle: dict[str, Any]) -> dict[str, str]:
    """Identifier and status of every resource of the bundle that has one, as the server holds them now."""
    held = {}
    for entry in bundle["entry"]:
        resource = entry["resource"]
        if resource["resourceType"] in ("Observation", "DiagnosticReport"):
            identifier = resource["identifier"][0]
            rows = found(ehr, resource["resourceType"], identifier=f"{identifier['system']}|{identifier['value']}")
            assert len(rows) == 1, "updated in place, not stored again"
            held[identifier["value"]] = rows[0]["status"]
    return held


@pytest.mark.parametrize("name", ["final, withdrawn", "amended", "no lesion left", "gland rejected"])
def test_hapi_takes_each_revision_in_turn_and_holds_the_last(ehr: httpx.Client, name: str) -> None:
    """Each chain under a study of its own; every resource is valid, and none is left with an earlier status."""
    uid = CHAINS[name][0].study_instance_uid
    other = f"2.25.{900 + JUDGED.index(name)}"
    held: dict[str, str] = {}
    revisions = rendered(name)
    for findings, contents in zip(revisions.revisions, revisions.contents, strict=True):
        bundle = json.loads(contents["fhir-bundle.json"].decode().replace(uid, other))
        for entry in bundle["entry"]:
            assert errors(ehr, entry["resource"]) == [], entry["resource"]["resourceType"]
        assert {*send(ehr, bundle)} <= {"200", "201"}
        before, held = held, stored(ehr, bundle)
        assert set(before) <= set(held)
        gone = {f"urn:oid:{row.finding.tracking_uid}" for row in findings.dropped}
        assert {held[identifier] for identifier in held if identifier in gone} <= {"entered-in-error"}
        assert held[f"{other}:prostate_mri"] == findings.status
    agents = [a["type"]["coding"][0]["code"] for p in found(ehr, "Provenance") for a in p["agent"]]
    assert "verifier" in agents or "author" in agents
