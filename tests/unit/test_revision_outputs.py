"""Each revision in every output: silent where true, loud where a status, a signature or a deletion is wrong."""

import base64
import json
import re
from functools import cache
from io import BytesIO
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset

from mappings.model.findings import Findings
from mappings.model.ids import derive_uid
from mappings.outputs.consistency import check_consistency, expected_names
from mappings.outputs.findings_to_rejection_note import findings_to_rejection_note
from mappings.reading.findings_to_revision import sign_findings
from middleware.release.validation import find_faults
from tests.builders import build_findings, build_masks
from tests.dicom_sources import build_sources
from tests.mutations_dicom import edit_dicom
from tests.mutations_text import swap
from tests.renderings import place_findings, render_contents
from tests.revisions import OWN_WORDS, Chain, Contents, at, build_chains, edit, first, render_chain, signed_by

CHAINS = build_chains()
SR, NOTE, ORU, FHIR, TEXT, HTML = (
    "sr.dcm",
    "rejection.dcm",
    "oru.hl7",
    "fhir-bundle.json",
    "report.txt",
    "report.html",
)


@cache
def rendered(name: str) -> Chain:
    return render_chain(CHAINS[name])


def dataset(name: str, artifact: str, position: int = -1) -> Dataset:
    return pydicom.dcmread(BytesIO(rendered(name).contents[position][artifact]))


def observations(name: str, position: int = -1) -> list[list[str]]:
    """The OBX of one revision's message as fields."""
    lines = rendered(name).contents[position][ORU].decode().split("\r")
    return [line.split("|") for line in lines if line.startswith("OBX|")]


def header(name: str, field: int, position: int = -1) -> str:
    lines = rendered(name).contents[position][ORU].decode().split("\r")
    fields = next(line for line in lines if line.startswith("OBR|")).split("|")
    return fields[field] if field < len(fields) else ""


def resources(name: str, kind: str, position: int = -1) -> list[dict[str, Any]]:
    bundle = json.loads(rendered(name).contents[position][FHIR])
    return [e["resource"] for e in bundle["entry"] if e["resource"]["resourceType"] == kind]


def by_uid(name: str, position: int = -1) -> dict[str, dict[str, Any]]:
    rows = resources(name, "Observation", position)
    return {row["identifier"][0]["value"].removeprefix("urn:oid:"): row for row in rows}


@pytest.mark.parametrize("name", CHAINS)
def test_every_revision_may_be_released(name: str) -> None:
    chain = rendered(name)
    former: bytes | None = None
    for findings, contents in zip(chain.revisions, chain.contents, strict=True):
        assert find_faults(findings, contents, build_masks(), former) == ()
        assert set(expected_names(findings)) <= set(contents)
        former = contents[ORU]


@pytest.mark.parametrize("template", ["generic"])
@pytest.mark.parametrize("name", ["amended, corrected", "no lesion left"])
def test_another_template_says_the_same(name: str, template: str) -> None:
    findings, contents, former = render_chain(CHAINS[name], template=template).last
    assert check_consistency(findings, contents, build_masks(), former) == ()


def test_without_people_nothing_is_said_of_revisions() -> None:
    contents = render_contents(place_findings(build_findings()))
    assert NOTE not in contents
    for name in (TEXT, HTML, ORU, FHIR):
        assert "revision:" not in contents[name].decode().casefold()
        assert "REPORT AS SIGNED" not in contents[name].decode()


# --- HL7 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "order", "results"),
    [
        ("final", "F", {"F"}),
        ("touched", "P", {"P"}),
        ("corrected", "C", {"C", "D"}),
        ("amended", "C", {"C"}),
        ("withdrawn", "C", {"W"}),
        ("final, withdrawn", "C", {"W", "D"}),
        ("lesion lost", "P", {"P", "D"}),
    ],
)
def test_order_and_result_status(name: str, order: str, results: set[str]) -> None:
    assert header(name, 25) == order
    assert {o[11] for o in observations(name)} == results


def test_a_deleted_observation_has_the_id_and_sub_id_that_it_was_sent_with() -> None:
    before = {(o[3], o[4]) for o in observations("corrected", 1) if o[4].startswith("3.")}
    deleted = {(o[3], o[4]): o[5] for o in observations("corrected") if o[11] == "D" and o[4].startswith("3.")}
    assert set(deleted) == before
    assert {*deleted.values()} == {'""'}


def test_sub_ids_stay_with_their_observation_and_new_ones_come_after_all_that_were_sent() -> None:
    groups = [
        {
            o[5]: o[4].split(".")[0]
            for o in observations("found again", i)
            if o[3].startswith("112040^") and o[5] != '""'
        }
        for i in range(3)
    ]
    start, lost, again = CHAINS["found again"]
    lesion_2 = start.lesions[1].tracking_uid
    assert [g[lesion_2] for g in groups] == ["3", "3", "3"]
    assert groups[2][again.lesions[1].tracking_uid] == "7"
    deleted = [{o[4] for o in observations("found again", i) if o[11] == "D"} for i in (1, 2)]
    assert {sub_id for sub_id in deleted[0] if sub_id.startswith("2.")} <= deleted[1]
    assert lost.lesions[0].tracking_uid == lesion_2


def test_lines_of_a_longer_former_report_are_deleted() -> None:
    shorter = [o for o in observations("corrected") if o[3].startswith("18782-3^")]
    longer = [o for o in observations("corrected", 1) if o[3].startswith("18782-3^")]
    assert {o[4] for o in shorter} >= {o[4] for o in longer}
    assert any(o[11] == "D" for o in shorter)


def test_who_signed_is_the_principal_interpreter() -> None:
    assert header("final", 32) == "D-117&Ferrer&Rosa&&&Dr"
    assert header("final", 32, 0) == header("withdrawn", 32) == ""


# --- FHIR ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHAINS)
def test_report_and_observations_have_the_status_and_none_is_left_dangling(name: str) -> None:
    seen: set[str] = set()
    for position, findings in enumerate(CHAINS[name]):
        (report,) = resources(name, "DiagnosticReport", position)
        rows = by_uid(name, position)
        assert report["status"] == findings.status
        gone = {row.finding.tracking_uid for row in findings.dropped}
        for uid, row in rows.items():
            withdrawn = uid in gone or any(uid == derive_uid(g, "psa_density") for g in gone)
            assert row["status"] == ("entered-in-error" if withdrawn else findings.status)
        assert seen <= set(rows)
        seen |= set(rows)


def test_a_report_names_only_what_still_stands() -> None:
    (report,) = resources("corrected", "DiagnosticReport")
    entries = json.loads(rendered("corrected").contents[-1][FHIR])["entry"]
    status = {e["fullUrl"]: e["resource"].get("status") for e in entries}
    assert {status[r["reference"]] for r in report["result"]} == {"corrected"}


def test_a_withdrawn_observation_names_the_model_that_had_proposed_it() -> None:
    uid = CHAINS["lesion lost"][0].lesions[0].tracking_uid
    row = by_uid("lesion lost")[uid]
    assert row["status"] == "entered-in-error"
    assert row["device"]["identifier"]["value"] == "prostate_reference:1"
    assert row["note"] == [{"text": "Lesion 1 (lesion-1) is not reported since revision 2: not found again."}]


def test_a_category_that_is_no_longer_given_is_absent_instead_of_left() -> None:
    uid = derive_uid(first().study_instance_uid, "prostate_mri", "pirads_overall")
    before, after = (by_uid("no lesion left", i)[uid] for i in (0, 1))
    assert "valueCodeableConcept" in before
    assert "valueCodeableConcept" not in after
    assert after["dataAbsentReason"]["text"] == "no longer given"


def test_each_revision_leaves_a_provenance_with_the_people_in_it() -> None:
    def agents(name: str, position: int = -1) -> list[tuple[str, str]]:
        (row,) = resources(name, "Provenance", position)
        return [(a["type"]["coding"][0]["code"], a["who"].get("display", "device")) for a in row["agent"]]

    assert agents("final", 0) == [("assembler", "device")]
    assert agents("final") == [("assembler", "device"), ("verifier", "Ferrer, Rosa")]
    assert agents("touched") == [("assembler", "device"), ("author", "Ferrer, Rosa")]
    assert agents("corrected") == [("assembler", "device"), ("verifier", "Weiß, Jörg"), ("author", "Ferrer, Rosa")]
    tags = {resources("corrected", "Provenance", i)[0]["meta"]["tag"][0]["code"] for i in range(3)}
    assert len(tags) == 3
    (withdrawn,) = resources("withdrawn", "Provenance")
    assert withdrawn["activity"]["coding"][0]["code"] == "NULLIFY"
    assert withdrawn["reason"] == [{"text": "wrong side of the study list"}]


def test_the_interpreter_and_the_new_text_are_in_the_report() -> None:
    (report,) = resources("amended", "DiagnosticReport")
    assert report["resultsInterpreter"] == [
        {"type": "Practitioner", "identifier": {"value": "D-117", **_TYPE}, "display": "Weiß, Jörg"}
    ]
    page = base64.b64decode(report["presentedForm"][0]["data"]).decode()
    assert OWN_WORDS.splitlines()[0] in page
    assert "resultsInterpreter" not in resources("amended", "DiagnosticReport", 0)[0]


_TYPE = {"type": {"coding": [{"system": "http://terminology.hl7.org/CodeSystem/v2-0203", "code": "EI"}]}}


# --- DICOM ---------------------------------------------------------------------------------------------------


def test_only_what_a_person_signed_is_verified_by_them() -> None:
    for position, findings in enumerate(CHAINS["amended"]):
        report = dataset("amended", SR, position)
        assert report.VerificationFlag == ("VERIFIED" if findings.signature else "UNVERIFIED")
        assert report.CompletionFlag == ("COMPLETE" if findings.signature else "PARTIAL")
        assert report.PreliminaryFlag == ("FINAL" if findings.signature else "PRELIMINARY")
    (observer,) = dataset("final", SR).VerifyingObserverSequence
    assert (str(observer.VerifyingObserverName), observer.VerifyingOrganization) == ("Ferrer^Rosa^^Dr", "St. Elsewhere")
    assert observer.VerificationDateTime == "20260304103500+0000"
    assert "VerifyingObserverSequence" not in dataset("withdrawn", SR)
    assert dataset("final", SR).CompletionFlagDescription == "Complete as signed, left blank: DCE"


def test_each_report_names_its_predecessor() -> None:
    uids = [dataset("corrected", SR, i).SOPInstanceUID for i in range(3)]
    for position in (1, 2):
        (study,) = dataset("corrected", SR, position).PredecessorDocumentsSequence
        assert study.ReferencedSeriesSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID == uids[position - 1]


def test_objects_say_first_whether_a_person_stands_behind_them() -> None:
    for name, words in (("final", "AI result, verified by a person"), ("touched", "AI result, not verified")):
        for artifact in ("seg.dcm", SR, "key-images/lesion-1.dcm"):
            assert dataset(name, artifact).SeriesDescription.startswith(words)
        assert words in dataset(name, "key-images/lesion-1.dcm").ImageComments
    assert dataset("withdrawn", SR).SeriesDescription.startswith("AI result, WITHDRAWN")


def references(item: Dataset) -> set[str]:
    return {str(e.value) for e in item.iterall() if e.keyword == "ReferencedSOPInstanceUID"}


@pytest.mark.parametrize(
    ("name", "title", "with_report"),
    [("corrected", "113001", False), ("rerun", "113001", False), ("withdrawn", "113037", True)],
)
def test_what_a_revision_replaces_is_rejected(name: str, title: str, with_report: bool) -> None:
    note = dataset(name, NOTE)
    before = rendered(name).contents[-2]
    objects = {k: pydicom.dcmread(BytesIO(v)).SOPInstanceUID for k, v in before.items() if k.endswith(".dcm")}
    rejected = {uid for k, uid in objects.items() if k != NOTE and (with_report or k != SR)}
    assert note.ConceptNameCodeSequence[0].CodeValue == title
    assert references(note) == rejected
    assert note.StudyInstanceUID == first().study_instance_uid


def test_a_withdrawn_result_has_no_segmentation_and_no_key_images() -> None:
    contents = rendered("withdrawn").contents[-1]
    assert set(contents) == {SR, NOTE, ORU, FHIR, TEXT, HTML}


def test_a_segmentation_without_the_rejected_lesion_is_a_new_one() -> None:
    before, after = (dataset("corrected", "seg.dcm", i) for i in (1, 2))
    assert before.SOPInstanceUID != after.SOPInstanceUID
    assert [s.TrackingID for s in before.SegmentSequence][3:] == ["lesion-1", "lesion-2"]
    assert [s.TrackingID for s in after.SegmentSequence][3:] == ["lesion-1"]
    assert [s.SegmentNumber for s in after.SegmentSequence] == [1, 2, 3, 4]


def test_a_rejected_lesion_is_not_drawn() -> None:
    before, after = (rendered("corrected").contents[i]["key-images/gland.png"] for i in (1, 2))
    assert before != after
    assert "key-images/lesion-2.png" not in rendered("corrected").contents[2]


def test_a_first_revision_rejects_nothing_and_a_note_needs_its_study() -> None:
    assert findings_to_rejection_note(first(), build_sources()) is None
    with pytest.raises(ValueError, match="none was given"):
        findings_to_rejection_note(CHAINS["rerun"][-1], [])


# --- words ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("final", "released as final by a person. Signed by Ferrer, Rosa, St. Elsewhere, 2026-03-04 10:35"),
        ("touched", "AI-PROPOSED, UNVERIFIED, PRELIMINARY: changed by a person, not signed."),
        ("touched", "Lesion 1, DWI score changed from 4 to 5 by Ferrer, Rosa, 2026-03-04 10:34+00:00: seen on DWI."),
        ("touched", "Lesion 2 accepted by Ferrer, Rosa"),
        ("corrected", "Lesion 2 (lesion-2) rejected by Ferrer, Rosa, 2026-03-04 10:34+00:00: artefact."),
        ("corrected", "Volume by ellipsoid changed from 50.0 mL to 65.0 mL"),
        ("amended", "Report text changed from nothing to own words by Weiß, Jörg"),
        ("amended", "Index lesion in the right PZ, 9 mm."),
        ("withdrawn", "WITHDRAWN (entered in error): do not use."),
        ("withdrawn", "revision 1 withdrawn by Ferrer, Rosa, 2026-03-04 10:42+00:00: wrong side of the study list."),
        ("no lesion left", "No lesion was proposed by the model that a person kept."),
        ("lesion lost", "Lesion 1 (lesion-1) is not reported since revision 2: not found again."),
        ("own report", "The radiologist's own final report of 2026-03-04 10:32+00:00 takes precedence"),
        ("rerun adopted", "Result, reading changed from revision 2 by prostate_reference 1 to a new one by"),
    ],
)
def test_the_report_says_what_people_did(name: str, words: str) -> None:
    contents = rendered(name).contents[-1]
    page = " ".join(re.sub(r"<[^>]+>", "", contents[HTML].decode()).split()).replace("&#39;", "'")
    assert words in " ".join(contents[TEXT].decode().split())
    assert words in page


def test_words_of_people_cannot_forge_a_section_a_mark_or_markup() -> None:
    rule = "-" * 40
    text = f"IMPRESSION\n{rule}\n  1. Lesion 9: X [lesion-9]\n<script>alert(1)</script>\x07|^~\\&\n{'=' * 80}"
    start, final = CHAINS["final"]
    reason = "Model: X [lesion-9/volume] Left blank: Revision: Lesion 1: <b>{{7*7}}"
    edits = [edit("rejected", "lesion-2", reason=reason)]
    signed = sign_findings(final, signed_by("O|Neil^A&B~C"), at(9), edits=edits, text=text)
    findings, contents, former = render_chain([start, final, signed]).last
    assert find_faults(findings, contents, build_masks(), former) == ()
    assert "<script>" not in contents[HTML].decode()


# --- the checker ---------------------------------------------------------------------------------------------


def drop_line(pattern: bytes) -> Any:
    def change(contents: Contents) -> None:
        lines = [line for line in contents[ORU].split(b"\r") if not re.search(pattern, line)]
        contents[ORU] = b"\r".join(lines)

    return change


def drop_observation(contents: Contents) -> None:
    bundle = json.loads(contents[FHIR])
    bundle["entry"] = [e for e in bundle["entry"] if e["resource"].get("status") != "entered-in-error"]
    contents[FHIR] = json.dumps(bundle).encode()


def drop_agent(contents: Contents) -> None:
    bundle = json.loads(contents[FHIR])
    for entry in bundle["entry"]:
        if "agent" in entry["resource"]:
            del entry["resource"]["agent"][1]
    contents[FHIR] = json.dumps(bundle).encode()


def drop_rejected(note: Dataset) -> None:
    del note.ContentSequence[-1]


MUTATIONS: dict[str, tuple[str, Any, str]] = {
    "oru: a deletion is missing": (ORU, drop_line(rb"^OBX\|\d+\|NM\|118565006.*\|3\.\d+\|"), "revision: deleted 3"),
    "oru: deleted status": (ORU, swap(ORU, '|""||||||D|', '|""||||||C|'), "expected"),
    "oru: deleted value": (ORU, swap(ORU, '|""||||||D|', "|9.99||||||D|"), "value of deleted"),
    "oru: another sub-id": (ORU, swap(ORU, "|1.1|", "|9.1|"), "revision: deleted 1.1"),
    "oru: still final": (ORU, swap(ORU, "|RAD|C|", "|RAD|F|"), "OBR-25"),
    "oru: who signed": (ORU, swap(ORU, "&Weiß&", "&Schwarz&"), "OBR-32"),
    "fhir: still final": (FHIR, swap(FHIR, '"status": "corrected"', '"status": "final"'), "status: .*corrected"),
    "fhir: left dangling": (FHIR, drop_observation, "withdrawn lesion-2: status"),
    "fhir: not withdrawn": (FHIR, swap(FHIR, '"entered-in-error"', '"corrected"'), "withdrawn lesion-2: status"),
    "fhir: nobody verified": (FHIR, drop_agent, "Provenance: agent"),
    "fhir: interpreter": (FHIR, swap(FHIR, '"display": "Weiß, Jörg"', '"display": "Schwarz, J"'), "resultsInterpreter"),
    "fhir: why": (FHIR, swap(FHIR, "10:34+00:00: artefact.", "10:34+00:00: artefacts."), "note|line"),
    "sr: unverified": (SR, edit_dicom(SR, lambda d: setattr(d, "VerificationFlag", "UNVERIFIED")), "VerificationFlag"),
    "sr: another signs": (
        SR,
        edit_dicom(SR, lambda d: setattr(d.VerifyingObserverSequence[0], "VerifyingObserverName", "Other^P")),
        "VerifyingObserverName",
    ),
    "sr: signed later": (
        SR,
        edit_dicom(SR, lambda d: setattr(d.VerifyingObserverSequence[0], "VerificationDateTime", "20260305")),
        "VerificationDateTime",
    ),
    "sr: no predecessor": (
        SR,
        edit_dicom(SR, lambda d: delattr(d, "PredecessorDocumentsSequence")),
        "predecessor",
    ),
    "sr: called unverified": (
        SR,
        edit_dicom(SR, lambda d: setattr(d, "SeriesDescription", "AI result, not verified: m")),
        "series description",
    ),
    "note: another reason": (
        NOTE,
        edit_dicom(NOTE, lambda d: setattr(d.ConceptNameCodeSequence[0], "CodeValue", "113037")),
        "title",
    ),
    "note: an object left": (NOTE, edit_dicom(NOTE, drop_rejected), "rejects"),
    "note: another revision": (
        NOTE,
        edit_dicom(NOTE, lambda d: setattr(d, "SOPInstanceUID", "2.25.7")),
        "SOPInstanceUID",
    ),
    "note: absent": (NOTE, lambda c: c.pop(NOTE), "expected one"),
    "text: banner": (TEXT, swap(TEXT, "corrected by a person", "amended by a person"), "banner"),
    "text: who signed": (TEXT, swap(TEXT, "Weiß, Jörg, St. Elsewhere", "Schwarz, J, St. Elsewhere"), "banner|line"),
    "text: what changed": (TEXT, swap(TEXT, "from 50.0 mL to 65.0", "from 50.0 mL to 66.0"), "revision: line"),
    "html: what changed": (HTML, swap(HTML, "from 50.0 mL to 65.0", "from 50.0 mL to 66.0"), "revision: line"),
    "html: a rejection left out": (
        HTML,
        lambda c: c.update({HTML: re.sub(rb"<li>Revision: Lesion 2 .*?</li>", b"", c[HTML])}),
        "revision: line: .*nothing|no more",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_wrong_word_on_a_revision_is_noticed(name: str) -> None:
    artifact, mutate, what = MUTATIONS[name]
    findings, contents, former = rendered("corrected").last
    changed = dict(contents)
    mutate(changed)
    assert changed.get(artifact) != contents[artifact]
    messages = check_consistency(findings, changed, build_masks(), former)
    own = [m for m in messages if m.startswith(f"{artifact}: ")]
    assert any(re.search(what, message) for message in own), messages
    assert not any(secret in m for m in messages for secret in ("Phantom", "TEST-00", "ACC-"))


def test_words_of_the_person_who_signed_are_held_to_the_findings() -> None:
    findings, contents, former = rendered("amended").last
    for artifact in (TEXT, HTML, SR):
        changed = {**contents, artifact: contents[artifact].replace(b"right PZ", b"left  PZ")}
        messages = check_consistency(findings, changed, build_masks(), former)
        assert any(m.startswith(f"{artifact}: ") for m in messages), artifact


def test_a_message_that_was_written_without_the_former_one_is_not_released() -> None:
    findings: Findings = CHAINS["corrected"][-1]
    contents = render_contents(findings)
    assert any("deleted observations" in m for m in check_consistency(findings, contents, build_masks()))
    former = rendered("corrected").contents[1][ORU]
    messages = check_consistency(findings, contents, build_masks(), former)
    assert any(m.startswith("oru.hl7: revision: ") for m in messages)
