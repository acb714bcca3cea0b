"""Images, messages and EHR must name one patient: before inference, and again before anything is released."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from typing import Any

import pytest
from fastapi import Response

from deploy.hospital.chart import MRN_SYSTEM, chart_bundle
from deploy.hospital.pacs import RunningOrthanc
from tests.arrivals import count_in, until
from tests.crash.small_study import Copy, SmallStudy
from tests.gates import Hospital, open_hospital
from tests.hl7_inbox import write_message, write_order

ANOTHERS = "the order of this study is another patient's"


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory, orthanc: RunningOrthanc) -> Iterator[Hospital]:
    with open_hospital(tmp_path_factory.mktemp("gates"), orthanc) as made:
        yield made


def order(fresh: Copy, control_id: str, control: str = "NW", *, patient: str = "", **numbers: str) -> bytes:
    given = {"accession": fresh.spec.accession, "study": "", **numbers}
    return write_order(
        f"{control_id}-{fresh.spec.patient_id}",
        control,
        (f"P-{fresh.spec.patient_id}", "", given["accession"], given["study"]),
        patient=patient or fresh.spec.patient_id,
    )


def chart_with(fresh: Copy, **changes: Any) -> dict[str, Any]:
    return chart_bundle(replace(fresh.spec, **changes))


def imaging_study_of(fresh: Copy, patient_id: str) -> dict[str, Any]:
    """The chart, and beside it a patient to whom the EHR counts the study."""
    bundle = copy.deepcopy(fresh.chart)
    someone = chart_bundle(replace(fresh.spec, patient_id=patient_id), psa_ng_ml=(), with_order=False)
    (entry,) = [e for e in someone["entry"] if e["resource"]["resourceType"] == "Patient"]
    study = {
        "resourceType": "ImagingStudy",
        "status": "available",
        "identifier": [{"system": "urn:dicom:uid", "value": f"urn:oid:{fresh.study_uid}"}],
        "subject": {"reference": entry["fullUrl"]},
    }
    request = {"method": "POST", "url": "ImagingStudy"}
    bundle["entry"] += [entry, {"fullUrl": "urn:uuid:9d5b0c1e-0000-4000-8000-000000000001", "resource": study,
                                "request": request}]  # fmt: skip
    return bundle


CHARTS: dict[str, tuple[Callable[[Copy], dict[str, Any]], str]] = {
    "sex": (lambda c: chart_with(c, sex="F"), "the sex in the images differs from the one in ehr"),
    "birth": (
        lambda c: chart_with(c, birth_date=date(1958, 12, 4)),
        "the birth date in the images differs from the one in ehr",
    ),
    "unknown": (
        lambda c: chart_with(c, patient_id="SOMEBODY", accession="ELSE"),
        "ehr has no single patient with the images' PatientID",
    ),
    "study": (
        lambda c: imaging_study_of(c, "GATE-OTHER"),
        "the ImagingStudy of this Study Instance UID belongs to another patient in ehr",
    ),
}


@pytest.mark.parametrize("name", CHARTS)
def test_disagreement_with_the_ehr_holds_before_inference(
    hospital: Hospital, small_study: SmallStudy, name: str
) -> None:
    make_chart, reason = CHARTS[name]
    fresh = small_study.copy(f"gate-{name}")
    job = hospital.read(hospital.admit(fresh, chart=make_chart(fresh)))
    assert (job.state, job.reasons[0]) == ("held", reason)
    assert "inference" not in hospital.site.steps(fresh.study_uid)
    hospital.assert_nothing_left(fresh)


MESSAGES: dict[str, tuple[Callable[[Copy], bytes], str]] = {
    "told-birth": (
        lambda c: write_message("ADT^A08", f"b-{c.spec.patient_id}", patient=c.spec.patient_id),
        "the birth date in the images differs from the one told by HL7",
    ),
    "told-other": (lambda c: order(c, "o", patient="SOMEBODY-ELSE"), ANOTHERS),
    "told-uid": (
        lambda c: order(c, "u", study="2.25.99"),
        "the order of this accession number is for another Study Instance UID",
    ),
    "told-accession": (
        lambda c: order(c, "a", study=c.study_uid, accession="ELSE-2"),
        "the accession number in the images differs from the one of the order for this study",
    ),
    "told-gone": (lambda c: order(c, "g", "CA"), "the order of this study is cancelled"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_disagreement_with_messages_holds_before_inference(
    hospital: Hospital, small_study: SmallStudy, name: str
) -> None:
    write, reason = MESSAGES[name]
    fresh = hospital.admit(small_study.copy(f"gate-{name}"))
    assert hospital.hear(write(fresh)).state == "applied"
    job = hospital.read(fresh)
    assert job.state == "held"
    assert reason in job.reasons
    assert "inference" not in hospital.site.steps(fresh.study_uid)
    hospital.assert_nothing_left(fresh)


def merge_in_messages(hospital: Hospital, fresh: Copy) -> None:
    away = fresh.spec.patient_id
    merge = write_message("ADT^A40", f"m-{away}", f"MRG|{away}^^^HOSP", patient=f"{away}-NEW")
    merge = merge.replace(b"19610203|F", b"19580412|M")  # the survivor is the phantom's patient
    assert hospital.hear(merge).state == "applied"


def cancel(hospital: Hospital, fresh: Copy) -> None:
    assert hospital.hear(order(fresh, "late", "CA")).state == "applied"


def name_another_patient(hospital: Hospital, fresh: Copy) -> None:
    assert hospital.hear(order(fresh, "late", patient="SOMEBODY-ELSE")).state == "applied"


def replace_in_ehr(hospital: Hospital, fresh: Copy) -> None:
    (patient,) = hospital.find_in_ehr("Patient", identifier=f"{MRN_SYSTEM}|{fresh.spec.patient_id}")
    hospital.tell_ehr(chart_with(fresh, patient_id=f"{fresh.spec.patient_id}-NEW", accession="x"))
    (survivor,) = hospital.find_in_ehr("Patient", identifier=f"{MRN_SYSTEM}|{fresh.spec.patient_id}-NEW")
    link = {"other": {"reference": f"Patient/{survivor['id']}"}, "type": "replaced-by"}
    hospital.put_in_ehr({**patient, "active": False, "link": [link]})


def revoke_in_ehr(hospital: Hospital, fresh: Copy) -> None:
    (request,) = hospital.find_in_ehr("ServiceRequest", identifier=fresh.spec.accession)
    hospital.put_in_ehr({**request, "status": "revoked"})


MEANWHILE: dict[str, tuple[Callable[[Hospital, Copy], None], str]] = {
    "merge": (merge_in_messages, "the patient of the images was merged into another one (ADT^A40)"),
    "cancel": (cancel, "the order of this study is cancelled"),
    "another": (name_another_patient, ANOTHERS),
    "replaced": (replace_in_ehr, "was merged into another (replaced-by)"),
    "revoked": (revoke_in_ehr, "the order of this accession number is revoked in ehr"),
}


@pytest.mark.parametrize("name", MEANWHILE)
def test_what_is_told_while_the_study_is_read_holds_its_result(
    hospital: Hospital, small_study: SmallStudy, name: str
) -> None:
    tell, reason = MEANWHILE[name]
    fresh = hospital.admit(small_study.copy(f"gate-late-{name}"))
    with hospital.while_reading(fresh):
        tell(hospital, fresh)
    job = hospital.site.settled(fresh.study_uid, "held", within_s=60)
    assert reason in " ".join(job.reasons)
    assert {"inference", "validate", "release"} <= set(hospital.site.steps(fresh.study_uid))
    hospital.assert_nothing_left(fresh)


def test_what_agrees_is_released_everywhere(hospital: Hospital, small_study: SmallStudy) -> None:
    fresh = hospital.admit(small_study.copy("gate-agrees"))
    hospital.hear(order(fresh, "agrees", study=fresh.study_uid))
    job = hospital.read(fresh, "released")
    assert hospital.settle_deliveries(job.job_id) == {d: {"delivered"} for d in ("pacs", "ehr", "ris")}


def test_ehr_that_does_not_answer_at_the_second_look_stops_nobody_else(
    hospital: Hospital, small_study: SmallStudy
) -> None:
    fresh = hospital.admit(small_study.copy("gate-silent"))
    try:
        with hospital.while_reading(fresh):
            hospital.proxy.judge = lambda method, path, body: Response("down", 503)
        job = hospital.site.settled(fresh.study_uid, "released", within_s=60)
        until(lambda: hospital.delivery_states(job.job_id, "pacs", "ris") == {"delivered"}, what="delivering")
        assert hospital.delivery_states(job.job_id, "ehr") <= {"pending", "in_flight", "retrying"}
    finally:
        hospital.proxy.judge = lambda method, path, body: None
    assert hospital.settle_deliveries(job.job_id)["ehr"] == {"delivered"}


def test_silent_ehr_does_not_hide_what_messages_told_meanwhile(hospital: Hospital, small_study: SmallStudy) -> None:
    fresh = hospital.admit(small_study.copy("gate-silent-merge"))
    try:
        with hospital.while_reading(fresh):
            hospital.proxy.judge = lambda method, path, body: Response("down", 503)
            merge_in_messages(hospital, fresh)
        assert hospital.site.settled(fresh.study_uid, "held", within_s=60).reasons
    finally:
        hospital.proxy.judge = lambda method, path, body: None
    hospital.assert_nothing_left(fresh)


def test_result_for_one_patient_is_not_followed_by_one_for_another_without_a_person(
    hospital: Hospital, small_study: SmallStudy
) -> None:
    fresh = hospital.admit(small_study.copy("gate-corrected"))
    first = hospital.read(fresh, "released")
    hospital.settle_deliveries(first.job_id)
    before = hospital.site.store.deliveries(job_id=first.job_id)
    corrected = "GATE-B"
    hospital.tell_ehr(chart_with(fresh, patient_id=corrected, accession="ACC-B"))
    hospital.correct_images(fresh, PatientID=corrected, AccessionNumber="ACC-B")
    job = hospital.site.settled(fresh.study_uid, "held", within_s=60)
    # The EHR still counts the study to whom it was reported for.
    assert job.reasons == [
        "the ImagingStudy of this Study Instance UID belongs to another patient in ehr",
        "the ImagingStudy of this Study Instance UID names another accession number in ehr",
        "a result of this study was released for another patient before; correct that one first",
    ]
    assert hospital.site.store.deliveries(job_id=job.job_id) == before
    assert count_in(hospital.orthanc, fresh.study_uid) == len(fresh.instances)
    ended = hospital.run("release", job.job_id, "--reason", "the first one was retracted by phone", "--person", "Anna")
    assert ended.code == 0, ended.said
    job = hospital.site.settled(fresh.study_uid, "released", within_s=60)
    assert job.revision == 2
    said = hospital.report_text(job, 2)
    assert "Released by Anna although a result of this study was released for another patient before" in said
    assert corrected in said


def test_images_corrected_after_a_merge_are_read_for_the_survivor(hospital: Hospital, small_study: SmallStudy) -> None:
    fresh = hospital.admit(small_study.copy("gate-survivor"))
    first = hospital.read(fresh, "released")
    hospital.settle_deliveries(first.job_id)
    survivor = f"{fresh.spec.patient_id}-NEW"
    (patient,) = hospital.find_in_ehr("Patient", identifier=f"{MRN_SYSTEM}|{fresh.spec.patient_id}")
    hospital.put_in_ehr({**patient, "identifier": [{"system": MRN_SYSTEM, "value": survivor}]})
    merge_in_messages(hospital, fresh)
    hospital.correct_images(fresh, PatientID=survivor, IssuerOfPatientID="A DICOM NAME")
    job = hospital.site.settled(fresh.study_uid, "released", runs=2, within_s=60)
    assert job.revision == 2
    assert survivor in hospital.report_text(job, 2)
