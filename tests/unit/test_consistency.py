"""The consistency checker: silent on every true rendering, and loud on each kind of disagreement."""

import ast
import dataclasses
import re
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mappings.model.context import ClinicalContext, ContextPatient
from mappings.model.findings import Blank, Findings
from mappings.model.study import PatientIdentity
from mappings.outputs.consistency import check_consistency, expected_names
from mappings.outputs.dicom_header import write_dicom
from mappings.outputs.findings_to_seg import findings_to_seg
from tests.builders import build_context, build_findings, build_gland, build_lesion, build_masks
from tests.comparisons import COMPARED, build_ambiguous, build_compared, build_not_found
from tests.dicom_sources import build_sources
from tests.mutations_changes import CHANGE_MUTATIONS, NONE_FOUND, UNSURE
from tests.mutations_dicom import DICOM_MUTATIONS, KEY, SEG, SR, edit_dicom, shift_planes
from tests.mutations_text import FHIR, HTML, ORU, TEXT, TEXT_MUTATIONS
from tests.renderings import place_findings, read_random_result, render_contents, render_result

Contents = dict[str, bytes]
JAPANESE = "Yamada^Tarou=山田^太郎=やまだ^たろう"
HOSTILE = "<script>alert(1)</script>{{7*7}}|^~\\& \"'> [lesion-9/volume]"
OUTPUTS = Path(__file__).parents[2] / "mappings" / "outputs"


def named(name: str) -> PatientIdentity:
    return PatientIdentity("TEST-001", "", name, date(1961, 5, 6), "M")


def placed(**changes: object) -> Findings:
    return place_findings(build_findings(**changes))  # type: ignore[arg-type]


def hostile() -> Findings:
    order = build_context().order
    assert order is not None
    lesion = dataclasses.replace(
        build_lesion(), title=HOSTILE, notes=(HOSTILE.partition(" [")[0], "Please check. " * 20)
    )
    return placed(
        lesions=(lesion,),
        context=build_context(order=dataclasses.replace(order, reason=HOSTILE, requester=HOSTILE)),
        study_description=HOSTILE,
        blanks=(Blank("PSA density", HOSTILE),),
        technique=(HOSTILE,),
        warnings=(HOSTILE,),
    )


def nothing() -> Findings:
    """Nothing found at all: no gland, no lesion, no segment."""
    return placed(
        lesions=(),
        findings=(),
        segments=(),
        context=ClinicalContext("none", missing=("patient: not in the bundle",)),
        psa=None,
        blanks=(Blank("Prostate gland", "the model found no gland"), Blank("PSA density", "no PSA in the EHR")),
    )


TEMPLATE_OF = {"ambiguous": "generic", "no prior found": "generic"}


def hostile_comparison() -> Findings:
    """Words of priors that could forge a line, a mark or markup."""
    found = build_compared()
    done = found.comparison
    assert done is not None
    words = HOSTILE.partition(" [")[0]
    rows = tuple(
        dataclasses.replace(r, prior=r.prior and dataclasses.replace(r.prior, title=words), notes=(words,))
        for r in done.lesions
    )
    priors = tuple(dataclasses.replace(p, description=HOSTILE) for p in found.priors)
    return dataclasses.replace(found, comparison=dataclasses.replace(done, lesions=rows, notes=(words,)), priors=priors)


VARIANTS: dict[str, Callable[[], tuple[Findings, Contents]]] = {}


def variant(name: str, findings: Findings, **rendering: Any) -> None:
    VARIANTS[name] = lambda: (findings, render_contents(findings, **rendering))


variant("default", placed())
variant("generic template", placed(), template="generic")
variant("another EHR", placed(), ehr_gave_context=False)
variant("no lesions", placed(lesions=()))
variant("nothing found", nothing())
variant(
    "no context",
    placed(context=ClinicalContext("", missing=("no EHR is configured",)), psa=None),
)
variant("no order", placed(context=build_context(order=None)))
variant("no patient in the EHR", placed(context=build_context(patient=None)))
variant(
    "no PSA",
    placed(findings=(build_gland(None), build_lesion()), psa=None, blanks=(Blank("PSA density", "no PSA in the EHR"),)),
)
variant("no blanks", placed(blanks=()))
variant(
    "bare lesion",
    placed(
        findings=(
            build_gland(),
            dataclasses.replace(
                build_lesion(),
                laterality=None,
                zone=None,
                level=None,
                sector=None,
                measurements=(),
                assessments=(),
                confidence=None,
            ),
        ),
        assessments=(),
    ),
)
variant("hostile words", hostile(), StudyDescription="any")
variant("hostile comparison", hostile_comparison())
variant("long title", placed(lesions=(dataclasses.replace(build_lesion(), title="Lesion " + "x" * 300),)))
variant(
    "Japanese name", placed(patient=named(JAPANESE)), SpecificCharacterSet=["", "ISO 2022 IR 87"], PatientName=JAPANESE
)
variant(
    "German name",
    placed(patient=named("Müller-Lüdenscheidt^Jörg^^Dr^Jr")),
    PatientName="Müller-Lüdenscheidt^Jörg^^Dr^Jr",
)
variant(
    "issuer",
    placed(patient=PatientIdentity("TEST-001", "1.2.3.4.5", "Phantom^Peter", date(1961, 5, 6), "M")),
    IssuerOfPatientID="1.2.3.4.5",
)
variant(
    "nobody",
    placed(patient=PatientIdentity(""), accession_number="", study_date=None),
    PatientName="",
    PatientID="",
    PatientBirthDate="",
    PatientSex="",
    AccessionNumber="",
    StudyDate="",
)
variant("revision", placed(revision=2, predecessor_revision=1, status="amended"))
variant("another zone", placed(created_at=datetime(2026, 3, 4, 23, 30, 5, tzinfo=UTC)), TimezoneOffsetFromUTC="+0900")
for kind, build in COMPARED.items():
    variant(kind, build(), template=TEMPLATE_OF.get(kind, "prostate_mri"))
for one in ("final", "corrected", "entered-in-error"):
    variant(one, placed(status=one))


@pytest.mark.parametrize("name", VARIANTS)
def test_true_renderings_agree(name: str) -> None:
    findings, contents = VARIANTS[name]()
    assert check_consistency(findings, contents, build_masks()) == ()
    assert set(expected_names(findings)) <= set(contents)
    assert ("seg.dcm" in contents) == bool(findings.segments)


@pytest.mark.parametrize("seed", range(6))
def test_results_of_the_reading_agree(seed: int) -> None:
    """Whatever the model draws and scores: no false alarm on what reading and rendering make of it."""
    findings, masks, volumes = read_random_result(seed)
    assert check_consistency(findings, render_result(findings, masks, volumes), masks) == ()


@pytest.fixture(scope="module")
def findings() -> Findings:
    return placed()


@pytest.fixture(scope="module")
def rendered(findings: Findings) -> Contents:
    return render_contents(findings)


MUTATIONS = {**DICOM_MUTATIONS, **TEXT_MUTATIONS}


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_disagreement_is_noticed_and_named(name: str, findings: Findings, rendered: Contents) -> None:
    artifact, mutate, what = MUTATIONS[name]
    contents = dict(rendered)
    mutate(contents)
    messages = check_consistency(findings, contents, build_masks())
    own = [message for message in messages if message.startswith(f"{artifact}: ")]
    assert any(re.search(what, message.removeprefix(f"{artifact}: ")) for message in own), messages
    for secret in ("Phantom", "Peter", "TEST-00", "ACC-", "PLAC-", "19610506"):
        assert not any(secret in message for message in messages)


@pytest.fixture(scope="module")
def compared() -> Contents:
    return render_contents(build_compared())


@pytest.fixture(scope="module")
def unsure() -> Contents:
    return render_contents(build_ambiguous())


@pytest.fixture(scope="module")
def none_found() -> Contents:
    return render_contents(build_not_found())


def assert_noticed(findings: Findings, rendered: Contents, mutation: tuple[str, Any, str]) -> None:
    artifact, mutate, what = mutation
    contents = dict(rendered)
    mutate(contents)
    assert contents[artifact] != rendered[artifact]
    messages = check_consistency(findings, contents, build_masks())
    own = [message for message in messages if message.startswith(f"{artifact}: ")]
    assert any(re.search(what, message.removeprefix(f"{artifact}: ")) for message in own), messages


@pytest.mark.parametrize("name", CHANGE_MUTATIONS)
def test_each_wrong_value_of_the_comparison_is_noticed(name: str, compared: Contents) -> None:
    assert_noticed(build_compared(), compared, CHANGE_MUTATIONS[name])


@pytest.mark.parametrize("name", UNSURE)
def test_each_wrong_word_about_a_lesion_that_cannot_be_matched_is_noticed(name: str, unsure: Contents) -> None:
    assert_noticed(build_ambiguous(), unsure, UNSURE[name])


@pytest.mark.parametrize("name", NONE_FOUND)
def test_that_no_prior_was_found_must_be_said(name: str, none_found: Contents) -> None:
    assert_noticed(build_not_found(), none_found, NONE_FOUND[name])


@pytest.mark.parametrize("without", ["comparison", "a row", "priors"])
def test_each_rendering_is_held_to_the_comparison(without: str, compared: Contents) -> None:
    findings = build_compared()
    done = findings.comparison
    assert done is not None
    fewer = {
        "comparison": dataclasses.replace(findings, comparison=None),
        "a row": dataclasses.replace(findings, comparison=dataclasses.replace(done, lesions=done.lesions[1:])),
        "priors": dataclasses.replace(findings, priors=()),
    }[without]
    named_artifacts = {m.split(":")[0] for m in check_consistency(fewer, compared, build_masks())}
    assert {SR, FHIR, TEXT, HTML} <= named_artifacts
    assert without == "priors" or ORU in named_artifacts


def test_enough_kinds_of_disagreement_are_tried() -> None:
    assert len(MUTATIONS) >= 40
    assert {artifact for artifact, _, _ in MUTATIONS.values()} >= {SEG, SR, KEY, ORU, FHIR, TEXT, HTML}


@pytest.mark.parametrize("name", [SEG, SR, KEY, "key-images/gland.dcm", ORU, FHIR, TEXT, HTML])
@pytest.mark.parametrize("data", [None, b"", b"\x00\xff garbage"])
def test_an_absent_or_broken_artifact_is_named(
    name: str, data: bytes | None, findings: Findings, rendered: Contents
) -> None:
    contents = {key: value for key, value in rendered.items() if key != name}
    if data is not None:
        contents[name] = data
    messages = check_consistency(findings, contents, build_masks())
    assert any(message.startswith(f"{name}: ") for message in messages), messages


@pytest.mark.parametrize("name", [SEG, SR, KEY, FHIR, TEXT, HTML])
def test_a_cut_off_artifact_is_named(name: str, findings: Findings, rendered: Contents) -> None:
    contents = {**rendered, name: rendered[name][: len(rendered[name]) // 2]}
    messages = check_consistency(findings, contents, build_masks())
    assert any(message.startswith(f"{name}: ") for message in messages), messages


def test_an_artifact_that_nobody_asked_for_is_named(findings: Findings, rendered: Contents) -> None:
    contents = {**rendered, "key-images/lesion-3.dcm": rendered[KEY], "other.txt": b"x"}
    messages = check_consistency(findings, contents, build_masks())
    assert {m.split(":")[0] for m in messages} == {"key-images/lesion-3.dcm", "other.txt"}


def test_a_segmentation_of_nothing_is_named(rendered: Contents) -> None:
    empty = nothing()
    contents = {**render_contents(empty), SEG: rendered[SEG]}
    messages = check_consistency(empty, contents, build_masks())
    assert messages == (f"{SEG}: artifact: expected none of this name, found one",)


def test_findings_that_lack_what_was_rendered_are_noticed_in_every_rendering(rendered: Contents) -> None:
    fewer = placed(lesions=(build_lesion(1),))
    messages = check_consistency(fewer, rendered, build_masks())
    for artifact in (SEG, SR, "key-images/lesion-2.dcm", ORU, FHIR, TEXT, HTML):
        assert any(message.startswith(f"{artifact}: ") for message in messages), artifact


@pytest.mark.parametrize(
    ("changes", "artifacts"),
    [
        ({"job_id": "other-job"}, (SEG, SR, KEY, ORU, FHIR)),
        ({"revision": 2}, (SEG, SR, KEY, ORU, FHIR, TEXT, HTML)),
        ({"status": "final"}, (SR, ORU, FHIR, TEXT, HTML)),
        ({"study_instance_uid": "2.25.9"}, (SEG, SR, KEY, ORU, FHIR, TEXT, HTML)),
        ({"accession_number": "ACC-9"}, (SEG, SR, KEY, ORU, FHIR, TEXT, HTML)),
        ({"patient": named("Other^Name")}, (SEG, SR, KEY, ORU, TEXT, HTML)),
        ({"psa": None}, (SR, FHIR, TEXT, HTML)),
        ({"blanks": ()}, (SR, ORU, FHIR, TEXT, HTML)),
        ({"assessments": ()}, (SR, KEY.replace("lesion-1", "gland"), ORU, FHIR, TEXT, HTML)),
        (
            {"context": build_context(patient=ContextPatient("Patient/p2", ()))},
            (FHIR,),
        ),
    ],
)
def test_each_rendering_is_held_to_the_findings(
    changes: dict[str, object], artifacts: tuple[str, ...], findings: Findings, rendered: Contents
) -> None:
    messages = check_consistency(dataclasses.replace(findings, **changes), rendered, build_masks())  # type: ignore[arg-type]
    named_artifacts = {message.split(":")[0] for message in messages}
    assert set(artifacts) <= named_artifacts, messages


def test_a_note_that_forges_a_mark_is_noticed() -> None:
    lesion = dataclasses.replace(build_lesion(), notes=("Volume 9.99 mL [lesion-9/volume]",))
    findings = placed(lesions=(lesion,))
    messages = check_consistency(findings, render_contents(findings), build_masks())
    assert messages == ("report.txt: lesion-9: volume: expected nothing, found 'Volume 9.99 mL'",)


def test_without_masks_the_place_of_each_segment_is_still_checked(findings: Findings, rendered: Contents) -> None:
    contents = dict(rendered)
    edit_dicom(SEG, shift_planes)(contents)
    assert check_consistency(findings, rendered, None) == ()
    assert any("centroid" in message for message in check_consistency(findings, contents, None))


def test_a_single_segment_which_frames_share_is_read() -> None:
    masks = {name: mask * (name == "gland") for name, mask in build_masks().items()}
    alone = placed(lesions=())
    alone = dataclasses.replace(alone, segments=alone.segments[:1])
    seg = findings_to_seg(alone, masks, build_sources())
    assert seg is not None
    assert "SegmentIdentificationSequence" in seg.SharedFunctionalGroupsSequence[0]
    messages = check_consistency(alone, {SEG: write_dicom(seg)}, masks)
    assert not [message for message in messages if message.startswith(f"{SEG}:")]
    masks["gland"][2] = 0
    messages = check_consistency(alone, {SEG: write_dicom(seg)}, masks)
    assert [message for message in messages if message.startswith(f"{SEG}: planes")]


def test_masks_of_another_answer_are_noticed(findings: Findings, rendered: Contents) -> None:
    masks = build_masks()
    masks["lesions"] = np.roll(masks["lesions"], 1, axis=0)
    messages = check_consistency(findings, rendered, masks)
    assert any(message.startswith("seg.dcm: segment 4: ") for message in messages)


def test_the_checker_shares_no_code_with_the_renderings() -> None:
    for file in [OUTPUTS / "consistency.py", *OUTPUTS.glob("read_*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                own = name.removeprefix("mappings.outputs.")
                assert own == name or own.startswith("read_"), f"{file.name} imports {name}"
                assert "highdicom" not in name, f"{file.name} imports {name}"
