"""Which studies count as the patient's priors: of what the PACS, the EHR and our own memory tell, hostile or not."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from mappings.model.findings import Findings
from mappings.model.study import PatientIdentity, Study
from middleware.intake.inbox import accept_study
from middleware.intake.priors import MOST_CANDIDATES, find_in_ehr, find_in_pacs, find_own, join_priors
from middleware.intake.protocols import BUNDLED, load_protocol
from middleware.store.artifacts import ArtifactStore
from middleware.store.queries import Store, open_engine
from tests.builders import build_findings
from tests.hl7_inbox import Inbox, write_message

PROTOCOL = load_protocol(BUNDLED / "prostate_mri.yaml").protocol
PATIENT = PatientIdentity("4711", "HOSPITAL", birth_date=date(1961, 2, 3), sex="M")
STUDY = Study("1.2.3", PATIENT, (), study_date=date(2026, 3, 2), study_time="101500")
AT = datetime(2026, 3, 4, tzinfo=UTC)
ISSUERS = (("HOSPITAL", "HOSP"), ("LAKE",))


class Shelf:
    """A PACS that answers every search for studies with all it has, as one does that is asked for `*`."""

    def __init__(self, *studies: dict[str, Any], series: str = "t2 prostate") -> None:
        self.studies, self.series_text = studies, series
        self.asked: list[str] = []

    async def search_studies(
        self, filters: Mapping[str, str] | None = None, *, include: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        return list(self.studies)

    async def search_series(
        self, study_uid: str, filters: Mapping[str, str] | None = None, *, include: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        self.asked.append(study_uid)
        return [{"00080060": {"Value": ["MR"]}, "0008103E": {"Value": [self.series_text]}}]


def kept(uid: str = "1.2.2", day: str = "20250302", **changes: str) -> dict[str, Any]:
    """QIDO's answer about one study of the patient."""
    values = {
        "0020000D": uid, "00080020": day, "00100020": "4711", "00100021": "HOSPITAL", "00100030": "19610203",
        "00100040": "M", "00080061": "MR",
        **{tag.removeprefix("t"): value for tag, value in changes.items()},
    }  # fmt: skip
    return {tag: {"Value": [value]} for tag, value in values.items() if value}


async def in_pacs(*studies: dict[str, Any], study: Study = STUDY, issuers: Any = (), **shelf: str) -> list[str]:
    pacs: Any = Shelf(*studies, **shelf)
    found = await find_in_pacs(pacs, [study.patient.patient_id], study, PROTOCOL, issuers)
    assert all(prior.found_in == "pacs" for prior in found)
    return [prior.study_instance_uid for prior in found]


async def test_earlier_study_of_the_patient_is_found_with_what_names_it() -> None:
    pacs: Any = Shelf(kept(t00081030="MR pelvis", t00080050="ACC-1"))
    (prior,) = await find_in_pacs(pacs, ["4711"], STUDY, PROTOCOL)
    assert (prior.study_date, prior.description, prior.accession_number) == (date(2025, 3, 2), "MR pelvis", "ACC-1")


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (kept(), True),
        (kept(uid="1.2.3"), False),  # the study itself
        (kept(uid=""), False),
        (kept(uid="1.2.3/../../x"), False),
        (kept(day="20260303"), False),  # later
        (kept(day="20270101"), False),
        (kept(day="20260302", t00080030="101459"), True),  # the same day, earlier
        (kept(day="20260302", t00080030="1014"), True),
        (kept(day="20260302", t00080030="101501"), False),
        (kept(day="20260302", t00080030="11"), False),
        (kept(day="20260302"), True),  # the same day: nobody knows which came first
        (kept(day=""), True),  # listed, and not compared for want of a date
        (kept(t00100020="4712"), False),
        (kept(t00100020="47110"), False),
        (kept(t00100020=""), False),
        (kept(t00100021="LAKE"), False),
        (kept(t00100021="HOSP"), False),
        (kept(t00100021=""), True),
        (kept(t00100030="19610302"), False),
        (kept(t00100030=""), True),
        (kept(t00100030="19610"), True),
        (kept(t00100040="F"), False),
        (kept(t00100040=""), True),
        (kept(t00080061="CT"), False),
        (kept(t00080061=""), True),  # a server that does not tell modalities: the series do
    ],
)
async def test_only_what_may_be_an_earlier_study_of_the_patient_counts(answer: dict[str, Any], found: bool) -> None:
    assert await in_pacs(answer) == (["1.2.2"] if found else [])


async def test_names_that_the_site_lists_are_one_issuer() -> None:
    assert await in_pacs(kept(t00100021="HOSP"), issuers=ISSUERS) == ["1.2.2"]
    assert await in_pacs(kept(t00100021="LAKE"), issuers=ISSUERS) == []


async def test_study_of_another_region_is_none() -> None:
    assert await in_pacs(kept(), series="brain") == []
    assert await in_pacs(kept(t00081030="MR Prostata"), series="brain") == ["1.2.2"]


@pytest.mark.parametrize("patient_id", ["*", "471?", "4*", "?" * 4])
async def test_wildcard_in_the_patient_id_matches_itself_only(patient_id: str) -> None:
    study = replace(STUDY, patient=replace(PATIENT, patient_id=patient_id))
    others = [kept(uid=f"1.3.{n}") for n in range(5)]
    own = kept(uid="1.4", t00100020=patient_id)
    assert await in_pacs(*others, own, study=study) == ["1.4"]


async def test_of_thousands_of_studies_only_the_newest_that_may_match_are_looked_at() -> None:
    many = [kept(uid=f"1.5.{n}", day=f"20{n % 24:02}0101") for n in range(3000)]
    newer = [kept(uid=f"1.6.{n}", day="20250601", t00080061="CT") for n in range(500)]
    newest = [kept(uid=f"1.7.{n}", day="20250701") for n in range(3)]
    pacs: Any = Shelf(*many, *newer, *newest)
    found = await find_in_pacs(pacs, ["4711"], STUDY, PROTOCOL)
    assert len(pacs.asked) == len(found) == MOST_CANDIDATES
    assert {prior.study_instance_uid for prior in found[:3]} == {"1.7.0", "1.7.1", "1.7.2"}


@pytest.mark.parametrize("answer", [{}, {"0020000D": None}, {"0020000D": {"Value": [{"a": 1}]}}, {"00100020": []}])
async def test_malformed_answers_are_passed_over(answer: dict[str, Any]) -> None:
    assert await in_pacs(answer, kept()) == ["1.2.2"]


# EHR


class Chart:
    """An EHR that answers with these resources."""

    def __init__(self, *found: Any) -> None:
        self.found = found

    async def search(
        self, resource_type: str, params: Mapping[str, str], *, limit: int | None = None
    ) -> list[dict[str, Any]]:
        return list(self.found)


def imaging(uid: str = "1.2.2", started: str = "2025-03-02", **changes: Any) -> dict[str, Any]:
    return {
        "resourceType": "ImagingStudy",
        "status": "available",
        "subject": {"reference": "Patient/1"},
        "identifier": [{"system": "urn:dicom:uid", "value": f"urn:oid:{uid}"}],
        "started": started,
        "description": "MR prostate",
        "modality": [{"code": "MR"}],
        **changes,
    }


async def test_imaging_studies_of_the_patient_in_the_ehr_are_found() -> None:
    found = [
        imaging(),
        {"resource": imaging("1.2.1", "2024-03-02"), "fullUrl": "x"},
        imaging("1.2.9", "2026-03-03"),
        imaging("1.2.8", subject={"reference": "Patient/2"}),
        imaging("1.2.7", modality=[{"code": "CT"}]),
        imaging("no uid"),
        {"resource": "not an object"},
        {},
    ]
    source: Any = Chart(*found)
    priors = await find_in_ehr(source, "Patient/1", STUDY, PROTOCOL)
    assert [(p.study_instance_uid, p.found_in) for p in priors] == [("1.2.2", "ehr"), ("1.2.1", "ehr")]


# Our own memory


class Memory:
    """What a service keeps: readings and messages."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(open_engine(f"sqlite:///{folder}/wetread.sqlite"))
        self.artifacts = ArtifactStore(str(folder / "artifacts"))
        self.inbox = Inbox(issuers=ISSUERS)

    def keep(
        self, uid: str = "1.2.2", *, patient: PatientIdentity = PATIENT, found: PatientIdentity | None = None,
        day: date = date(2025, 3, 2), time: str = "", state: str = "released", protocol: str = PROTOCOL.name,
    ) -> str:  # fmt: skip
        """A study that was read for `found` and whose images now say `patient`; its job."""
        read = Study(uid, patient, (), study_date=day, study_time=time)
        findings = replace(build_findings(), study_instance_uid=uid, study_date=day, patient=found or patient)
        job, _ = accept_study(self.store, uid, source="test", key=uid, now=AT)
        facts = {
            "study": self.artifacts.put(TypeAdapter(Study).dump_json(read)).digest,
            "findings": self.artifacts.put(TypeAdapter(Findings).dump_json(findings)).digest,
        }
        images = {"patient_id": patient.patient_id, "patient_issuer": patient.issuer, "study_date": day.isoformat()}
        self.store.update_job(job.job_id, AT, state=state, protocol=protocol, facts=facts, images=images)
        return job.job_id

    def find(self, study: Study = STUDY) -> list[str]:
        found = find_own(self.store, self.inbox.store, self.artifacts, study, PROTOCOL, ISSUERS)
        assert all(digest for _, digest in found)
        return [prior.study_instance_uid for prior, _ in found]


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    return Memory(tmp_path)


def other(**changes: Any) -> PatientIdentity:
    return replace(PATIENT, **changes)


@pytest.mark.parametrize(
    ("how", "found"),
    [
        ({}, True),
        ({"uid": "1.2.3"}, False),
        ({"day": date(2026, 3, 3)}, False),
        ({"day": date(2026, 3, 2), "time": "09"}, True),
        ({"day": date(2026, 3, 2), "time": "120000"}, False),
        ({"state": "rejected"}, False),
        ({"protocol": "another"}, False),
        ({"patient": other(patient_id="4712")}, False),
        ({"patient": other(issuer="LAKE")}, False),
        ({"patient": other(issuer="HOSP")}, True),
        ({"patient": other(issuer="")}, True),
        ({"patient": other(birth_date=date(1961, 3, 2))}, False),
        ({"patient": other(birth_date=None)}, True),
        ({"patient": other(sex="F")}, False),
        ({"patient": PATIENT, "found": other(patient_id="4712")}, False),  # images corrected since, result not
        ({"patient": PATIENT, "found": other(birth_date=date(1961, 3, 2))}, False),
    ],
)
def test_own_reading_is_a_prior_only_of_the_same_patient(memory: Memory, how: dict[str, Any], found: bool) -> None:
    uid = how.get("uid", "1.2.2")
    memory.keep(**how)
    assert memory.find() == ([uid] if found else [])


def test_study_before_a_merge_is_found_under_the_former_id(memory: Memory) -> None:
    memory.keep(patient=other(patient_id="OLD"))
    memory.keep("1.2.1", patient=other(patient_id="STRANGER"), day=date(2024, 1, 1))
    assert memory.find() == []
    merge = write_message("ADT^A40", "m", "MRG|OLD^^^HOSP", patient="4711")
    assert memory.inbox.hear(merge).state == "applied"
    assert memory.find() == ["1.2.2"]


def test_lost_or_foreign_findings_stop_nothing(memory: Memory) -> None:
    lost, foreign = memory.keep("1.2.1", day=date(2024, 1, 1)), memory.keep("1.2.0", day=date(2023, 1, 1))
    memory.keep()
    memory.store.update_job(lost, AT, facts={"findings": "0" * 64})
    memory.store.update_job(foreign, AT, facts={"findings": memory.artifacts.put(b'{"kept": "otherwise"}').digest})
    assert memory.find() == ["1.2.2"]


async def test_each_study_is_named_once_and_by_our_own_memory_first(memory: Memory) -> None:
    memory.keep()
    own = find_own(memory.store, memory.inbox.store, memory.artifacts, STUDY, PROTOCOL)
    pacs: Any = Shelf(kept(), kept(uid="1.2.1"))
    source: Any = Chart(imaging(), imaging("1.2.1"), imaging("1.2.0"))
    joined = join_priors(
        own,
        await find_in_pacs(pacs, ["4711"], STUDY, PROTOCOL),
        await find_in_ehr(source, "Patient/1", STUDY, PROTOCOL),
    )
    assert [(p.study_instance_uid, p.found_in, bool(digest)) for p, digest in joined] == [
        ("1.2.2", "own readings", True),
        ("1.2.1", "pacs", False),
        ("1.2.0", "ehr", False),
    ]
