"""A comparison in the drafts, SR, FHIR and ORU: what each says, that each is valid, and the phantom's known growth."""

import html
import json
import re
from dataclasses import replace
from datetime import date
from io import BytesIO
from typing import Any

import pydicom
import pytest
from hl7apy.consts import VALIDATION_LEVEL  # type: ignore[import-untyped]
from hl7apy.parser import parse_message  # type: ignore[import-untyped]
from pydicom.dataset import Dataset

from deploy.hospital.phantom import PhantomLesion, PhantomSpec, _default_lps
from mappings.model.findings import Findings
from mappings.outputs.findings_to_bundle import check_bundle
from mappings.outputs.impression import findings_to_impression
from tests.builders import build_findings
from tests.comparisons import (
    COMPARED,
    PRIOR_UID,
    build_ambiguous,
    build_compared,
    build_not_found,
    build_refused,
    build_short,
    compare_with,
)
from tests.mutations_dicom import content_items
from tests.renderings import render_contents
from tests.unit.test_priors import read_phantom, thick_axial_grid, thin_axial_grid

Contents = dict[str, bytes]


@pytest.fixture(scope="module")
def rendered() -> dict[str, Contents]:
    return {name: render_contents(build()) for name, build in COMPARED.items()}


def section(contents: Contents) -> str:
    """The text draft's section, its lines joined."""
    text = contents["report.txt"].decode()
    return " ".join(text.partition("\nCOMPARISON")[2].partition("\nIMPRESSION")[0].split())


def components(contents: Contents, text: str) -> dict[str, dict[str, Any]]:
    """The components of the Observation of this title by Wetread's key."""
    found = next(o for o in observations(contents) if o["code"]["text"] == text)
    return {c["code"]["coding"][-1]["code"]: c for c in found["component"]}


def observations(contents: Contents) -> list[dict[str, Any]]:
    entries = json.loads(contents["fhir-bundle.json"])["entry"]
    return [e["resource"] for e in entries if e["resource"]["resourceType"] == "Observation"]


def resource(contents: Contents, kind: str) -> dict[str, Any]:
    entries = json.loads(contents["fhir-bundle.json"])["entry"]
    return next(e["resource"] for e in entries if e["resource"]["resourceType"] == kind)  # type: ignore[no-any-return]


def obx(contents: Contents, group: str) -> dict[str, list[str]]:
    """The OBX fields of one OBX-4 group by the code of OBX-3."""
    rows = [line.split("|") for line in contents["oru.hl7"].decode().split("\r") if line.startswith("OBX|")]
    return {row[3].split("^")[0]: row for row in rows if row[4].startswith(f"{group}.")}


def report(contents: Contents) -> Dataset:
    return pydicom.dcmread(BytesIO(contents["sr.dcm"]))


def number(item: Dataset) -> tuple[str, str]:
    value = item.MeasuredValueSequence[0]
    return str(value["NumericValue"].value), value.MeasurementUnitsCodeSequence[0].CodeValue


# --- drafts --------------------------------------------------------------------------------------------------


def test_the_text_draft_says_what_became_of_each_lesion(rendered: dict[str, Contents]) -> None:
    said = section(rendered["compared"])
    assert "Prior study: 2025-03-04, 365 days before" in said
    assert "Volume by voxel count: before 40.0 mL, now 44.3 mL, difference +4.3 mL (+10.7%)" in said
    assert "In the prior: Lesion 1, 0.3 mm from its place there" in said
    assert "before 0.16 mL, now 0.31 mL, difference +0.15 mL (+93.8%), per year +0.15 mL/a (+93.8%/a)" in said
    assert "Volume doubling time: 383 d" in said
    assert "In the prior: none, it is new" in said
    assert "Lesion 2 of 2025-03-04 has no counterpart in this study." in said
    assert "Not compared: 2023-05-06, MR pelvis, accession number ACC-0, found in pacs: no findings of it" in said


def test_an_ambiguous_lesion_names_its_candidates_and_gets_no_numbers(rendered: dict[str, Contents]) -> None:
    said = section(rendered["ambiguous"])
    assert "In the prior: not decided: Lesion 1 or Lesion 2" in said
    assert "Please match by eye." in said
    assert "difference -0.19 mL (-38.0%)" in said
    assert "part of a change may be the model's" in said
    assert "doubling" not in said
    assert not [key for key in components(rendered["ambiguous"], "Lesion 1") if key.startswith("volume_")]


def test_a_short_interval_gives_no_rates_anywhere(rendered: dict[str, Contents]) -> None:
    contents = rendered["three weeks apart"]
    assert "too short for a rate of growth" in section(contents)
    for words in (section(contents), contents["oru.hl7"].decode(), contents["fhir-bundle.json"].decode()):
        assert "per_year" not in words
        assert "mL/a" not in words


def test_no_prior_is_said_only_where_somebody_looked(rendered: dict[str, Contents]) -> None:
    assert section(rendered["no prior found"]).endswith("No prior study was found.")
    said = section(rendered["no prior comparable"])
    assert "No prior study could be compared." in said
    assert (
        "no date, MR Prostate, accession number ACC-2, found in own readings: one of the studies has no date." in said
    )
    plain = render_contents()
    for name in ("report.txt", "report.html", "fhir-bundle.json", "oru.hl7"):
        assert b"omparison" not in plain[name]
        assert b"prior study" not in plain[name].lower()


@pytest.mark.parametrize("template", ["prostate_mri", "generic"])
@pytest.mark.parametrize("name", COMPARED)
def test_both_templates_keep_the_width_and_say_the_same(name: str, template: str) -> None:
    contents = render_contents(COMPARED[name](), template=template)
    assert max(map(len, contents["report.txt"].decode().splitlines())) <= 80
    assert "\n\n\n" not in contents["report.txt"].decode().partition("\nCOMPARISON")[2].partition("\nIMPRESSION")[0]
    page = html.unescape(re.sub(r"<[^>]+>", " ", contents["report.html"].decode()))
    for line in findings_to_impression(COMPARED[name]()):
        if line.startswith("Since"):
            assert line in page
            assert line in " ".join(contents["report.txt"].decode().split())


def test_the_impression_is_short_and_names_only_what_matters() -> None:
    def since(findings: Findings) -> list[str]:
        return [line.partition(": ")[2] for line in findings_to_impression(findings) if line.startswith("Since 2")]

    assert since(build_compared()) == [
        "Lesion 1 grew from 0.16 to 0.31 mL (+93.8%), doubling time 383 d.",
        "Lesion 2 is new.",
        "Lesion 2 of that study was not found again.",
    ]
    assert since(build_ambiguous()) == ["Lesion 1 could not be matched with certainty."]
    assert since(build_short()) == since(build_refused()) == since(build_not_found()) == since(build_findings()) == []


# --- SR ------------------------------------------------------------------------------------------------------


def test_the_report_has_the_changes_in_the_lesion_s_group(rendered: dict[str, Contents]) -> None:
    sr = report(rendered["compared"])
    for key, value in (
        ("volume_prior", ("0.16", "mL")),
        ("volume_difference", ("0.15", "mL")),
        ("volume_percent", ("93.8", "%")),
        ("volume_per_year", ("0.15", "mL/a")),
        ("diameter_in_plane_percent_per_year", ("26.7", "%/a")),
        ("doubling_time", ("383", "d")),
        ("prior_distance", ("0.3", "mm")),
    ):
        (item,) = content_items(sr, "lesion-1", key)
        assert number(item) == value
    (before,) = content_items(sr, "lesion-1", "volume_prior")
    assert before.ObservationDateTime == "20250304"
    (status,) = content_items(sr, "lesion-2", "change_status")
    assert status.ConceptCodeSequence[0].CodeValue == "new"


def test_no_change_carries_the_code_of_its_quantity(rendered: dict[str, Contents]) -> None:
    """Who looks for the volume finds one, and it is the lesion's."""
    (volume,) = content_items(report(rendered["compared"]), "lesion-1", "118565006")
    assert number(volume) == ("0.31", "mL")
    rows = [line.split("|") for line in rendered["compared"]["oru.hl7"].decode().split("\r") if "|118565006^" in line]
    assert [row[5] for row in rows] == ["44.3", "50.0", "0.31", "0.31"]


def test_the_report_names_the_prior_and_what_only_it_has(rendered: dict[str, Contents]) -> None:
    findings, sr = build_compared(), report(rendered["compared"])
    assert findings.comparison is not None
    prior = findings.comparison.lesions[0].prior
    assert prior is not None
    assert [i.UID for i in content_items(sr, "lesion-1", "prior_tracking_uid")] == [prior.tracking_uid]
    assert len(content_items(sr, "lesion-1", "112040")) == 1
    assert [i.UID for i in content_items(sr, "study", "prior_study_uid")] == [PRIOR_UID]
    (gone,) = content_items(sr, "study", "121069")
    assert gone.TextValue.startswith("Lesion 2 of 2025-03-04 has no counterpart in this study.")
    assert findings.comparison.gone[0].tracking_uid in gone.TextValue


# --- FHIR and ORU --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPARED)
def test_bundle_and_message_stay_valid(name: str, rendered: dict[str, Contents]) -> None:
    assert check_bundle(json.loads(rendered[name]["fhir-bundle.json"])) == ()
    message = rendered[name]["oru.hl7"].decode()
    parsed = parse_message(message, validation_level=VALIDATION_LEVEL.STRICT, find_groups=True)
    assert parsed.validate()


def test_the_bundle_refers_to_the_prior_by_identifier(rendered: dict[str, Contents]) -> None:
    findings, contents = build_compared(), rendered["compared"]
    assert findings.comparison is not None
    prior = findings.comparison.lesions[0].prior
    assert prior is not None
    lesion = next(o for o in observations(contents) if o["code"]["text"] == "Lesion 1")
    uids = [d["identifier"]["value"] for d in lesion["derivedFrom"] if "identifier" in d]
    assert uids == [f"urn:oid:{PRIOR_UID}", f"urn:oid:{prior.tracking_uid}"]
    sources = [e["what"] for e in resource(contents, "Provenance")["entity"]]
    identifier = {"system": "urn:wetread:report", "value": f"{PRIOR_UID}:prostate_mri"}
    assert {"type": "DiagnosticReport", "identifier": identifier} in sources
    assert components(contents, "Lesion 1")["prior_study_date"]["valueDateTime"] == "2025-03-04"
    assert "Lesion 2 of that study was not found again" in resource(contents, "DiagnosticReport")["conclusion"]


def test_a_revision_without_comparison_leaves_no_change_in_the_ehr() -> None:
    """The changes are parts of Observations that the revision replaces."""
    without = replace(build_compared(), comparison=None, revision=2)
    before, after = (
        {o["identifier"][0]["value"] for o in observations(render_contents(f))} for f in (build_compared(), without)
    )
    assert before == after


def test_the_message_has_the_changes_under_the_lesion_s_sub_id(rendered: dict[str, Contents]) -> None:
    rows = obx(rendered["compared"], "2")
    assert [rows["volume_percent"][n] for n in (2, 5, 6)] == ["NM", "93.8", "%^percent^UCUM"]
    assert (rows["volume_prior"][5], rows["volume_prior"][14]) == ("0.16", "20250304")
    assert (rows["volume_difference"][5], rows["volume_difference"][14]) == ("0.15", "20260304")
    assert rows["volume_difference"][17].startswith("difference-from-prior^")
    assert rows["doubling_time"][5:7] == ["383", "d^day^UCUM"]
    study = obx(rendered["compared"], "4")
    assert (study["prior_study_date"][2], study["prior_study_date"][5]) == ("DT", "20250304")
    assert study["gone"][5] == "Lesion 2 of 2025-03-04 has no counterpart in this study."
    assert "difference +0.15 mL" in rendered["compared"]["oru.hl7"].decode()


# --- two sittings of the phantom -----------------------------------------------------------------------------

GROWTH = 1.3**3 * 100 - 100
"""Percent of volume that the phantom's lesion grows: every diameter 1.3 times as long."""


def sittings(diameter_mm: float, thin: bool) -> Findings:
    """A year between them, the patient lying elsewhere. Counting voxels errs by -5 to +9 percent for a lesion of 12 mm
    on slices of 3 mm, whatever compares them; 2 percent can be shown from 16 mm on, or on slices up to 1.5 mm."""
    lesions = (PhantomLesion(_default_lps(-12.0, 5.0, 1.0), (diameter_mm,) * 3),)
    grid = thin_axial_grid if thin else thick_axial_grid
    before = read_phantom(PhantomSpec(study_date=date(2025, 3, 2), lesions=lesions), make_grid=grid)
    now = read_phantom(PhantomSpec(lesions=lesions, growth_factor=1.3), (-17.0, 6.0, 23.0), grid)
    return compare_with(now, before)


@pytest.fixture(scope="module", params=[(16.0, False), (12.0, True)], ids=["16 mm, thick", "12 mm, thin"])
def phantom(request: pytest.FixtureRequest) -> Contents:
    """The artifacts of the second sitting, without region: its masks do not lie on the builders' sources."""
    findings = sittings(*request.param)
    parts = tuple(replace(f, segment_number=None, evidence=()) for f in findings.findings)
    return render_contents(replace(findings, findings=parts, segments=()))


def test_known_growth_is_within_two_percent_in_every_output(phantom: Contents) -> None:
    said = re.search(r"Volume: before .*?difference .*?\(\+([0-9.]+)%\)", section(phantom))
    page = re.search(
        r'"lesion-1" data-measurement="volume_percent"[^>]*>\+([0-9.]+) %<', phantom["report.html"].decode()
    )
    assert said is not None
    assert page is not None
    found = [
        float(said[1]),
        float(page[1]),
        float(number(content_items(report(phantom), "lesion-1", "volume_percent")[0])[0]),
        components(phantom, "Lesion 1")["volume_percent"]["valueQuantity"]["value"],
        float(obx(phantom, "2")["volume_percent"][5]),
    ]
    assert len(set(found)) == 1
    assert found[0] == pytest.approx(GROWTH, rel=0.02)
