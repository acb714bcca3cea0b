"""kill -9 at every step boundary, and before and after each effect: after a restart everything arrived once.

The service runs against a real Orthanc, the RIS and a FHIR server, on one data_dir that lives through all kills.
`WETREAD_SOAK=1` makes the part with kills at random moments many times longer.
"""

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.hospital.ehr import RunningEhr, start_fallback
from deploy.hospital.pacs import RunningOrthanc
from deploy.hospital.ris import Behaviour
from deploy.hospital.ris_process import start_ris
from tests.commands import environment, zygote
from tests.crash.line import Line, settings_for
from tests.crash.small_study import Copy, SmallStudy
from tests.crash.victim import STEPS
from tests.serving import Service

SIGKILLED = -9
SOAK = bool(os.environ.get("WETREAD_SOAK"))
SEEDS, STUDIES, KILLS = (30, 6, 15) if SOAK else (1, 3, 5)
"""Of the kills at random moments."""
POINTS = (
    # An event: before it is kept, before it is queued, before it is answered.
    "accept.before", "accept.after", "queue.after",
    # Each step: its effects are done and its result is not kept; its result is kept.
    *(f"{step}.{when}" for step in STEPS for when in ("exit", "kept")),
    # What the steps do to others and to the store.
    "pacs-fetch.before", "pacs-fetch.middle", "pacs-fetch.after",
    "ehr-search.after:3", "infer.before", "infer.after",
    "job-updated.after:2", "save-artifacts.before", "save-artifacts.after", "plan.before", "plan.after",
    "start-delivering.before:1", "start-delivering.after:1", "start-delivering.after:3",
    "job-concluded.before", "job-concluded.after", "conclude.kept", "list_deliveries.kept:1",
    # Each delivery: marked, sent, answered, marked, kept.
    *(f"pacs-store.{when}:{n}" for n in (1, 3) for when in ("before", "after")),
    "pacs-marked-delivered.before:1", "pacs-marked-delivered.after:1", "pacs-marked-delivered.after:4",
    "ehr-marked-in_flight.after", "ehr-transaction.before", "ehr-transaction.after", "ehr-marked-delivered.after",
    "ris-marked-in_flight.after", "ris-send.before", "ris-send.after", "ris-marked-delivered.after",
    "attempt_delivery.kept:1", "attempt_delivery.kept:6",
)  # fmt: skip


@pytest.fixture(scope="module")
def line(
    tmp_path_factory: pytest.TempPathFactory, study: SmallStudy, orthanc: RunningOrthanc, small_triton: str
) -> Iterator[Line]:
    folder = tmp_path_factory.mktemp("line")
    with start_fallback(folder / "ehr") as ehr, start_ris(folder / "ris") as ris:
        service = Service(folder / "service", settings_for(orthanc, ehr, ris, small_triton))
        made = Line(service, study, orthanc, ehr, ris, folder / "arm")
        made.start()
        yield made
        made.stop()


def kill_at(line: Line, point: str, fresh: Copy) -> None:
    """Announce the study and see the service die at the point; then start it again."""
    line.arm.write_text(point)
    answer = line.service.announce(fresh.study_uid)
    assert line.service.wait_for_death(60) == SIGKILLED, f"{point} was never reached"
    line.start()
    if answer is None:  # a client that got no answer asks again
        assert line.service.announce(fresh.study_uid).status_code in (200, 202)  # type: ignore[union-attr]


def test_without_a_kill(line: Line) -> None:
    fresh = line.bring("none")
    answer = line.service.announce(fresh.study_uid)
    assert answer is not None
    assert answer.status_code == 202
    assert line.faults(fresh) == []


@pytest.mark.parametrize("point", POINTS)
def test_killed_once(point: str, line: Line) -> None:
    fresh = line.bring(str(POINTS.index(point)))
    kill_at(line, point, fresh)
    assert line.faults(fresh) == []


@pytest.mark.parametrize(
    "point",
    [
        "ris-marked-retrying.before",
        "ris-marked-retrying.after",
        "start-delivering.before:4",
        "start-delivering.after:4",
        "handed-over.after",
        "ris-marked-in_flight.before:2",
        "ris-marked-in_flight.after:2",
    ],
)
def test_killed_while_a_delivery_is_tried_again(point: str, line: Line) -> None:
    """The RIS hangs up once: between the two tries nothing but the store knows of the delivery."""
    fresh = line.bring(f"again-{point}")
    line.ris.behave(Behaviour.CLOSE, times=1)
    kill_at(line, point, fresh)
    assert line.faults(fresh) == []
    mine = [m for m in line.ris.received() if fresh.study_uid in m.text]
    assert len({m.text for m in mine}) == 1


def test_an_event_during_a_reading_that_is_killed_as_it_ends(line: Line) -> None:
    """The second event asks for another reading; it is not forgotten, and the same findings are sent once."""
    fresh = line.bring("again")
    line.arm.write_text("job-concluded.after")
    line.service.announce(fresh.study_uid)
    while line.service.jobs(fresh.study_uid)[0]["state"] == "accepted":
        time.sleep(0.01)
    line.service.announce(fresh.study_uid, **{"Idempotency-Key": "late image"})
    assert line.service.wait_for_death(60) == SIGKILLED
    line.start()
    assert line.faults(fresh) == []
    (job,) = line.service.jobs(fresh.study_uid)
    assert job["revision"] == 1
    reads = [entry for entry in line.service.log().splitlines() if '"fetch"' in entry and job["job_id"] in entry]
    assert len(reads) == 2


# A RIS that may not drop duplicates


@pytest.fixture(scope="module")
def careful(
    tmp_path_factory: pytest.TempPathFactory, study: SmallStudy, orthanc: RunningOrthanc, small_triton: str
) -> Iterator[Line]:
    """A line whose RIS is not declared to drop duplicates."""
    folder = tmp_path_factory.mktemp("careful")
    with start_fallback(folder / "ehr") as ehr, start_ris(folder / "ris") as ris:
        settings = settings_for(orthanc, ehr, ris, small_triton, duplicate_safe=False, ack_timeout_s=0.5)
        made = Line(Service(folder / "service", settings), study, orthanc, ehr, ris, folder / "arm")
        made.start()
        yield made
        made.stop()


@pytest.mark.parametrize(
    ("point", "state", "sent"),
    [
        ("ris-marked-in_flight.after", "ambiguous", 0),
        ("ris-send.before", "ambiguous", 0),
        ("ris-send.after", "ambiguous", 1),
        ("ris-marked-delivered.after", "delivered", 1),
        ("ris-marked-ambiguous.after", "ambiguous", 1),
    ],
)
def test_what_may_have_been_sent_is_never_sent_again(point: str, state: str, sent: int, careful: Line) -> None:
    fresh = careful.bring(f"careful-{point}")
    careful.ris.behave(Behaviour.SILENT if "marked-ambiguous" in point else Behaviour.ACCEPT)
    kill_at(careful, point, fresh)
    careful.ris.behave(Behaviour.ACCEPT)
    for _ in range(2):  # a further restart does not send it either
        job = careful.service.wait_until_settled(fresh.study_uid)
        states = {d["destination"]: d["state"] for d in job["deliveries"]}
        assert states == {"pacs": "delivered", "ehr": "delivered", "ris": state}
        assert len([m for m in careful.ris.received() if fresh.study_uid in m.text]) == sent
        careful.service.kill()
        careful.start()


def test_an_ambiguous_delivery_says_what_to_do(careful: Line) -> None:
    fresh = careful.bring("careful-words")
    kill_at(careful, "ris-send.after", fresh)
    job = careful.service.wait_until_settled(fresh.study_uid)
    (ris,) = [d for d in job["deliveries"] if d["destination"] == "ris"]
    assert "look in the RIS whether it arrived" in ris["reason"]


# From outside


def kill_at_random(service: Service, studies: list[Copy], rng: random.Random, kills: int) -> None:
    """Announce the studies and kill the service at `kills` random moments of its work."""
    for fresh in studies:
        assert service.announce(fresh.study_uid) is not None
    for _ in range(kills):
        time.sleep(rng.uniform(0.05, 2.0))
        service.kill()
        service.start()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_killed_at_random_moments_with_the_real_ehr(
    seed: int, tmp_path: Path, study: SmallStudy, orthanc: RunningOrthanc, ehr: RunningEhr, small_triton: str
) -> None:
    """The plain `wetread serve`, HAPI where this machine can run it, several studies at once."""
    with start_ris(tmp_path / "ris") as ris:
        service = Service(tmp_path / "service", settings_for(orthanc, ehr, ris, small_triton))
        line = Line(service, study, orthanc, ehr, ris, tmp_path / "arm")
        service.start()
        studies = [line.bring(f"random-{seed}-{n}") for n in range(STUDIES)]
        kill_at_random(service, studies, random.Random(seed), KILLS)
        assert {fresh.study_uid: line.faults(fresh) for fresh in studies} == {s.study_uid: [] for s in studies}
        line.stop()


def test_a_killed_process_command_is_finished_by_the_next(
    tmp_path: Path, study: SmallStudy, orthanc: RunningOrthanc, small_triton: str
) -> None:
    with start_fallback(tmp_path / "ehr") as ehr, start_ris(tmp_path / "ris") as ris:
        service = Service(tmp_path / "service", settings_for(orthanc, ehr, ris, small_triton))
        line = Line(service, study, orthanc, ehr, ris, tmp_path / "arm")
        fresh = line.bring("process")
        for number, point in enumerate(("pacs-store.after:2", "job-concluded.before", "")):
            line.arm.write_text(point)
            out, err = tmp_path / f"out-{number}", tmp_path / f"err-{number}"
            env = environment(service.folder / "tmp", VICTIM_ARM=str(line.arm))
            command = ["process", fresh.study_uid, "--out", str(tmp_path / "result")]
            pid = zygote().start("tests.crash.victim:main", command, service.folder, env, out, err)
            assert zygote().wait(pid, 60) == (SIGKILLED if point else 0), out.read_text() + err.read_text()
        assert (tmp_path / "result" / "sr.dcm").exists()
        service.start()
        assert line.faults(fresh) == []
        assert service.stop() == 0
