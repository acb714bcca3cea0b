"""Any sequence of what people and re-runs do: no system sees a status go backwards, and all outputs agree."""

import json
from collections.abc import Callable
from datetime import datetime
from io import BytesIO
from itertools import pairwise

import pydicom
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mappings.model.findings import Findings
from mappings.model.revision import Edit, OwnReport, Rejection, RevisionRefused
from mappings.outputs.consistency import check_consistency
from mappings.reading.findings_to_revision import edit_findings, note_own_report, sign_findings, withdraw_findings
from mappings.reading.rerun_to_revision import adopt_rerun, merge_rerun
from mappings.rules.result_status import may_follow
from tests.builders import build_masks
from tests.revisions import FERRER, WEISS, Contents, at, edit, first, read_again, render_messages, signed_by

Act = Callable[[Findings, datetime], Findings]
FHIR_RANK = {"preliminary": 0, "final": 1, "amended": 2, "corrected": 2, "entered-in-error": 3}
ORU_RANK = {"P": 0, "F": 1, "C": 2}
RESULT_RANK = {"P": 0, "F": 1, "C": 2, "W": 3, "D": 3}
EDITS: list[Edit] = [
    edit("accepted", "lesion-1"),
    edit("rejected", "lesion-1"),
    edit("rejected", "lesion-2"),
    edit("rejected", "gland"),
    edit("score", "lesion-1", "DWI score", "5"),
    edit("score", "lesion-2", "T2W score", "not usable"),
    edit("score", "lesion-2", "DWI score", "not usable"),
    edit("measurement", "gland", "volume_ellipsoid", "80"),
    edit("measurement", "gland", "diameter_ap", "30"),
    edit("measurement", "lesion-2", "volume", "1.5"),
]


def acts() -> st.SearchStrategy[Act]:
    some = st.lists(st.sampled_from(EDITS), max_size=2)
    version, without = st.sampled_from("23"), st.sampled_from([None, 1, 2])
    words = st.sampled_from([None, "Seen.", "Seen twice."])
    return st.one_of(
        some.map(lambda edits: lambda f, now: edit_findings(f, edits, now)),
        st.tuples(some, words, st.sampled_from([FERRER, WEISS])).map(
            lambda x: lambda f, now: sign_findings(f, signed_by(x[2]), now, edits=x[0], text=x[1])
        ),
        st.tuples(version, without).map(
            lambda x: lambda f, now: merge_rerun(f, read_again(f, version=x[0], without=x[1]), now)
        ),
        st.tuples(version, without).map(
            lambda x: lambda f, now: adopt_rerun(f, read_again(f, version=x[0], without=x[1]), signed_by(), now)
        ),
        st.just(lambda f, now: note_own_report(f, OwnReport("F", at(1)), now)),
        st.just(lambda f, now: withdraw_findings(f, Rejection(FERRER, now, "wrong study"), now)),
    )


def follow(done: list[Act]) -> list[Findings]:
    """The revisions that come of these acts; what is refused makes none."""
    revisions = [first()]
    for minutes, act in enumerate(done, 10):
        try:
            revisions.append(act(revisions[-1], at(minutes)))
        except RevisionRefused:
            continue
    return revisions


def test_no_status_goes_backwards_and_the_last_revision_agrees_everywhere() -> None:
    lengths = []

    @settings(max_examples=14, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(acts(), min_size=2, max_size=6))
    def check(done: list[Act]) -> None:
        revisions = follow(done)
        lengths.append(len(revisions))
        contents: list[Contents] = []
        for findings in revisions:
            contents.append(render_messages(findings, contents[-1]["oru.hl7"] if contents else None))
        for (old, new), (before, after) in zip(pairwise(revisions), pairwise(contents), strict=True):
            assert may_follow(old.status, new.status)
            compare_fhir(before, after)
            compare_oru(before, after)
            compare_sr(before, after)
        former = contents[-2]["oru.hl7"] if len(contents) > 1 else None
        messages = check_consistency(revisions[-1], contents[-1], build_masks(), former)
        assert [m for m in messages if not m.startswith("key-images/")] == []

    check()
    assert max(lengths) >= 4


def test_a_value_that_was_deleted_comes_back_as_another_observation() -> None:
    """The overall category goes with the last lesion, and comes back with a reading that has one."""
    none = edit_findings(first(), [edit("rejected", "lesion-1"), edit("rejected", "lesion-2")], at(4))
    revisions = [first(), none, adopt_rerun(none, read_again(none), signed_by(), at(6))]
    contents: list[Contents] = []
    for findings in revisions:
        contents.append(render_messages(findings, contents[-1]["oru.hl7"] if contents else None))
    for before, after in pairwise(contents):
        compare_oru(before, after)
        compare_fhir(before, after)
    messages = check_consistency(revisions[-1], contents[-1], build_masks(), contents[-2]["oru.hl7"])
    assert [m for m in messages if not m.startswith("key-images/")] == []


def compare_fhir(before: Contents, after: Contents) -> None:
    """Every resource with a status is still told of, and is no earlier than it was."""

    def read(contents: Contents) -> dict[str, str]:
        rows = [e["resource"] for e in json.loads(contents["fhir-bundle.json"])["entry"]]
        stated = [r for r in rows if r["resourceType"] in ("Observation", "DiagnosticReport")]
        assert len({r["identifier"][0]["value"] for r in stated}) == len(stated)
        return {r["identifier"][0]["value"]: r["status"] for r in stated}

    now = read(after)
    for identifier, status in read(before).items():
        assert FHIR_RANK[now[identifier]] >= FHIR_RANK[status], identifier


def compare_oru(before: Contents, after: Contents) -> None:
    """The order's status rises, and so does each observation's; each that was sent is still told of."""

    def read(contents: Contents) -> tuple[str, dict[str, tuple[str, str]]]:
        lines = [line.split("|") for line in contents["oru.hl7"].decode().split("\r")]
        order = next(line[25] for line in lines if line[0] == "OBR")
        return order, {f[4]: (f[3].split("^")[0], f[11]) for f in lines if f[0] == "OBX"}

    (old, sent), (new, rows) = read(before), read(after)
    assert ORU_RANK[new] >= ORU_RANK[old]
    for sub_id, (code, status) in sent.items():
        assert rows[sub_id][0] == code
        # A line of the report that was taken back may come again; an observation with a value of its own may not.
        assert code in ("18782-3", "19005-8") or RESULT_RANK[rows[sub_id][1]] >= RESULT_RANK[status], sub_id


def compare_sr(before: Contents, after: Contents) -> None:
    """The report names the one before it, and is not called preliminary after one that was final."""
    old, new = (pydicom.dcmread(BytesIO(contents["sr.dcm"])) for contents in (before, after))
    assert (old.PreliminaryFlag, new.PreliminaryFlag) != ("FINAL", "PRELIMINARY")
    (study,) = new.PredecessorDocumentsSequence
    assert study.ReferencedSeriesSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID == old.SOPInstanceUID
