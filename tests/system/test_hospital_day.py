"""A day of hospital traffic ends with every eligible study read once, and every other one explained.

The service, a real Orthanc and Triton, the EHR (in memory), the RIS and python-hl7's client as two sites' senders.
`WETREAD_SOAK=1` makes the day longer (`WETREAD_DAYS` times the stories, under other numbers), and kills the service
at random moments of it; `WETREAD_SEED` draws it anew.
"""

import os
import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deploy.hospital.ehr import start_fallback
from deploy.hospital.pacs import start_orthanc
from deploy.hospital.ris_process import start_ris
from middleware.intake.protocols import BUNDLED
from tests.crash.small_study import SmallStudy
from tests.hospital_day import EHR_ROOTS, FAMILY, ISSUERS, WITHIN_S, Day, Visit
from tests.hospital_stories import STORIES, Story
from tests.proxy import open_proxy

SOAK = bool(os.environ.get("WETREAD_SOAK"))
SEED = int(os.environ.get("WETREAD_SEED", "20260304"))
DAYS = int(os.environ.get("WETREAD_DAYS", "5" if SOAK else "1"))
AT_ONCE = 8
KILLS_EVERY_S = (3.0, 12.0)
SET_ASIDE = [
    {"expression": 'study.description.matches(r"(?i)\\bphantom\\b")', "say": "a QA phantom"},
    {"expression": 'patient.name.startsWith("ZZTEST")', "say": "a test patient"},
]
PACS_A_REVISION = {"SEG": 1, "SR": 1}
ENDED = ("released", "held", "unmatched", "unusable", "rejected")

pytestmark = pytest.mark.timeout(3600 if SOAK else 900)


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory, small_study: SmallStudy, small_triton: str) -> Iterator[Day]:
    """The whole day, told to its end; nothing is under way any more."""
    folder = tmp_path_factory.mktemp("day")
    with (
        start_orthanc(folder / "orthanc", stable_age_s=60) as orthanc,
        start_fallback(folder / "ehr") as ehr,
        start_ris(folder / "ris") as ris,
        open_proxy(ehr.url.removesuffix("/fhir")) as proxy,
    ):
        settings = {
            "pacs": {"url": orthanc.dicomweb_url},
            "pacs_watch": {"interval_s": 1.0, "recent_days": 20000, "look_back_every_s": 3.0, "look_back_days": 20000},
            "ehr": {"url": f"{proxy.url}/fhir"},
            "ris": {"host": ris.host, "port": ris.port, "duplicate_safe": True},
            "triton": {"url": small_triton},
            "completeness": {"quiet_s": 1.5, "longest_wait_s": 10.0, "look_every_s": 0.5},
            "retry": {"attempts": 8, "first_wait_s": 0.1, "longest_wait_s": 1.0},
            "site": {"issuers": ISSUERS},
            "protocols_dir": str(write_protocols(folder / "protocols")),
            "concurrent_readings": 4,  # two stories have their reading wait in the middle
        }
        made = Day(folder, orthanc, ehr, proxy, ris, small_study, SEED, settings)
        made.start()
        live_through(made)
        yield made
        assert made.service.stop() == 0, made.service.log()[-3000:]


def write_protocols(folder: Path) -> Path:
    """The bundled protocol with rules that set studies aside; without key images, which take long to draw."""
    folder.mkdir()
    protocol = yaml.safe_load((BUNDLED / "prostate_mri.yaml").read_text(encoding="utf-8"))
    protocol |= {"set_aside": SET_ASIDE, "outputs": {**protocol["outputs"], "pacs": ["seg", "sr"]}}
    (folder / "prostate_mri.yaml").write_text(yaml.safe_dump(protocol, sort_keys=False))
    return folder


def live_through(day: Day) -> None:
    """Tell all stories beside each other, and wait until nothing is under way."""
    stories = list(STORIES) * DAYS
    random.Random(SEED).shuffle(stories)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        told = [pool.submit(tell, day, number, story) for number, story in enumerate(stories)]
        kill_now_and_then(day, told)
    wait_for_rest(day)


def tell(day: Day, number: int, story: Story) -> None:
    day.begin_story(number, story.__name__)
    try:
        story(day)
    except Exception as error:  # the other stories go on; a test tells of this one
        day.broken_off.append(f"{story.__name__}: {type(error).__name__}: {error}")


def kill_now_and_then(day: Day, told: list[Future[None]]) -> None:
    """Kill the service at random moments until all is told."""
    rng = random.Random(SEED)
    while SOAK and not all(each.done() for each in told):
        time.sleep(rng.uniform(*KILLS_EVERY_S))
        with day.one_command:
            day.service.kill()
            time.sleep(rng.uniform(0.0, 1.0))
            day.service.start()


def wait_for_rest(day: Day) -> None:
    """Wait until no job and no delivery goes on, and images that came last were looked at."""
    deadline = time.monotonic() + WITHIN_S
    quiet = 0
    while quiet < 8 and time.monotonic() < deadline:
        quiet = 0 if under_way(day) else quiet + 1
        time.sleep(0.5)


def under_way(day: Day) -> list[Any]:
    store = day.store
    busy = [(j.study_instance_uid, j.state, j.reasons) for j in store.jobs_in_state("waiting", "accepted", "reading")]
    due = [(job.study_instance_uid, "is due") for job in day.due()]
    sent = [d.artifact_name for s in ("pending", "in_flight", "retrying") for d in store.deliveries(state=s)]
    return [*busy, *due, *sent, *day.heard.pending()]


# How every study stands


def test_every_story_came_to_its_end_and_nothing_is_under_way(day: Day) -> None:
    assert day.broken_off == []
    assert under_way(day) == []


def test_every_study_stands_as_it_must(day: Day) -> None:
    faults = {name_of(visit): found for visit in day.visits if (found := faults_of_job(visit))}
    assert not faults, show(faults)


def show(faults: dict[str, Any]) -> str:
    return "\n".join(f"{name}: {found}" for name, found in faults.items())


def name_of(visit: Visit) -> str:
    return f"{visit.story} {visit.accession} ({visit.study_uid[-8:]})"


def faults_of_job(visit: Visit) -> list[Any]:
    expected, job = visit.expected, visit.job
    if job is None:
        return [] if not expected.state else ["no job"]
    runs = job.facts["run"]
    was_fetched = any(run.step == "fetch" for run in visit.day.store.step_runs(job.job_id))
    found: list[Any] = []
    if (job.state, runs) != (expected.state, expected.runs):
        found.append((job.state, f"{runs} runs", job.reasons, f"must be {expected.state} in {expected.runs}"))
    if expected.state == "released" and job.revision != expected.revisions:
        found.append(f"revision {job.revision}, not {expected.revisions}")
    if was_fetched != expected.fetched:
        found.append(f"fetched: {was_fetched}")
    deliveries = {d.state for d in visit.day.store.deliveries(job_id=job.job_id)}
    if deliveries != ({"delivered"} if expected.state == "released" else set()):
        found.append(f"deliveries are {deliveries}")
    return found


def test_every_study_that_is_not_read_is_explained(day: Day) -> None:
    explained = [visit for visit in day.visits if visit.expected.reason]
    assert len(explained) >= 14 * DAYS
    missing = {}
    for visit in explained:
        ended = day.command("explain", visit.study_uid)
        said = re.sub(r"\s+", " ", ended.said)
        if ended.code != 0 or visit.expected.reason not in said:
            missing[name_of(visit)] = (visit.expected.reason, said[:1500])
    assert not missing, show(missing)


def test_no_study_is_left_without_an_end(day: Day) -> None:
    states = {job.state for visit in day.visits if (job := visit.job)}
    assert states == set(ENDED)
    assert {visit.study_uid for visit in day.visits if visit.expected.state} == {
        job.study_instance_uid for job in day.store.jobs_in_state(*ENDED)
    }


def test_order_that_is_done_never_opens_again(day: Day) -> None:
    late = [visit for visit in day.visits if visit.story == "ordinary"]
    assert late
    for visit in late:
        (order,) = day.heard.orders_of_study(visit.study_uid)
        assert order.status == "completed"


# What every system has


def revisions(visit: Visit) -> int:
    return visit.expected.revisions if visit.expected.state == "released" else 0


def test_ris_has_one_message_a_revision_and_each_is_of_the_right_person(day: Day) -> None:
    accepted = [message.text for message in day.ris.accepted()]
    faults: dict[str, Any] = {}
    for visit in day.visits:
        mine = [fields(text) for text in accepted if visit.study_uid in text]
        person, placer = f"{visit.person.number}^^^{visit.person.site}^MR", (visit.placer, "")
        wrong = [one for one in mine if one["PID"][3] != person or one["OBR"][2] not in placer]
        if wrong or len(mine) != revisions(visit) or any(one["OBR"][18] != visit.accession for one in mine):
            faults[name_of(visit)] = (len(mine), [(one["PID"][3], one["OBR"][2:4], one["OBR"][18]) for one in mine])
    assert not faults, show(faults)
    assert len(accepted) == sum(map(revisions, day.visits))
    assert all("No prior study was found" in text for text in accepted)  # each person is here once, whatever the number


def fields(text: str) -> dict[str, list[str]]:
    """Fields of the first segment of each name."""
    lines = [line.split("|") for line in text.split("\r") if line]
    return {line[0]: line for line in reversed(lines)}


def test_pacs_has_one_set_a_revision_in_the_name_of_the_right_person(day: Day) -> None:
    faults = {}
    for visit in day.visits:
        if not visit.expected.state:
            continue
        answer = httpx.get(
            f"{day.orthanc.dicomweb_url}/studies/{visit.study_uid}/metadata", trust_env=False, timeout=60
        )
        headers = answer.json()
        counts = {kind: sum(value(one, "00080060") == kind for one in headers) for kind in PACS_A_REVISION}
        whose = {(value(one, "00100020"), value(one, "00100021"), value(one, "00100030")) for one in headers}
        expected = {kind: n * revisions(visit) for kind, n in PACS_A_REVISION.items()}
        person = visit.person
        if counts != expected or whose != {(person.number, person.site, f"{person.birth_date:%Y%m%d}")}:
            faults[name_of(visit)] = (counts, whose)
    assert not faults, show(faults)


def value(headers: dict[str, Any], tag: str) -> str:
    return str(next(iter(headers.get(tag, {}).get("Value", ())), ""))


def test_ehr_has_one_report_a_study_with_the_right_patient(day: Day) -> None:
    studies = {one["id"]: one["identifier"][0]["value"].removeprefix("urn:oid:") for one in in_ehr(day, "ImagingStudy")}
    patients = {one["id"]: one["identifier"][0] for one in in_ehr(day, "Patient")}
    reports: dict[str, list[tuple[str, str]]] = {}
    for report in in_ehr(day, "DiagnosticReport"):
        study_uid = studies[report["imagingStudy"][0]["reference"].rpartition("/")[2]]
        owner = patients[report["subject"]["reference"].rpartition("/")[2]]
        reports.setdefault(study_uid, []).append((owner["system"], owner["value"]))
    expected = {
        visit.study_uid: [(f"{EHR_ROOTS[visit.person.site]}.1", visit.person.number)]
        for visit in day.visits
        if revisions(visit)
    }
    assert reports == expected


def in_ehr(day: Day, kind: str) -> list[dict[str, Any]]:
    """Every resource of a kind."""
    found: list[dict[str, Any]] = []
    url = f"{day.ehr.url}/{kind}?_count=200"
    while url:
        page = httpx.get(url, trust_env=False, timeout=60).json()
        found += [entry["resource"] for entry in page.get("entry", [])]
        url = next((link["url"] for link in page.get("link", []) if link["relation"] == "next"), "")
    return found


# What was left behind


def test_messages_were_all_applied_or_refused_with_a_reason(day: Day) -> None:
    counts = day.heard.count_by_state()
    assert set(counts) <= {"applied", "refused"}
    about = {("accession_number", visit.accession) for visit in day.visits}
    refused = day.heard.refused_about(about)
    assert len(refused) == counts["refused"]
    assert all("differs from the one known for this order" in " ".join(one.notes) for one in refused)


def test_log_holds_no_traceback_and_nobody(day: Day) -> None:
    log = day.service.log()
    assert "Traceback" not in log
    persons = [visit.person for visit in day.visits]
    secrets = {FAMILY, FAMILY.upper(), "ZZTEST", *(visit.accession for visit in day.visits)}
    secrets |= {person.number for person in persons}
    secrets |= {text for one in persons for text in (f"{one.birth_date:%Y%m%d}", one.birth_date.isoformat())}
    assert [secret for secret in secrets if secret in log] == []
