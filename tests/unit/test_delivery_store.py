"""Who may send what now: states, order within an accession, destinations that are down, and people's decisions."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from threading import Barrier

import pytest
from rich.console import Console

from mappings.model.protocol import Outputs
from middleware.delivery_desk import print_rows
from middleware.release.health import note_answer, note_failure, note_wish
from middleware.release.redelivering import (
    NotDeliverable,
    Replay,
    Word,
    replay_result,
    retry_delivery,
    settle_delivered,
)
from middleware.settings import DestinationSettings
from middleware.store.deliveries import SETTLED, DeliveryStore
from middleware.store.queries import Store, open_engine
from middleware.store.tables import ArtifactRecord, Delivery, StudyEvent, StudyJob

NOW = datetime(2026, 3, 4, 10, 30, tzinfo=UTC)
LATER = NOW + timedelta(minutes=5)
DOWN_AFTER_1 = DestinationSettings(down_after=1, probe_every_s=30, longest_wait_s=100)


class Desk:
    """Both stores on one database."""

    def __init__(self, url: str) -> None:
        engine = open_engine(url)
        self.store, self.deliveries = Store(engine), DeliveryStore(engine)

    def plan(self, *planned: Delivery, now: datetime = NOW) -> None:
        self.store.plan_deliveries(planned[0].job_id, planned[0].revision, planned, now)

    def claim(self, delivery_id: str, workflow: str = "w", now: datetime = NOW, **how: bool) -> bool:
        return self.deliveries.claim(delivery_id, workflow, now, **how).may_send

    def due(self, now: datetime = LATER) -> list[str]:
        return [d.delivery_id for d in self.deliveries.due(now)]

    def bring_down(self, destination: str, by: str) -> None:
        """A delivery fails, and with it its destination."""
        self.claim(by)
        fail = partial(note_failure, reason="no connection", now=NOW, settings=DOWN_AFTER_1)
        self.deliveries.settle(by, NOW, "retrying", reason="no connection", due_at=NOW, health=fail)
        assert self.deliveries.health(destination).down_since == NOW


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(f"sqlite:///{tmp_path}/wetread.sqlite")


def delivery(name: str = "d", *, job_id: str = "j", revision: int = 1, key: str = "", **more: object) -> Delivery:
    columns = {
        "delivery_id": name,
        "job_id": job_id,
        "revision": revision,
        "destination": "pacs",
        "artifact_name": "seg.dcm",
        "kind": "seg",
        "digest": "0" * 64,
        "position": 0,
        "order_key": key or job_id,
        "created_at": NOW,
        "updated_at": NOW,
    }
    return Delivery(**{**columns, **more})


def at_once(times: int, action: Callable[[int], object]) -> list[object]:
    barrier = Barrier(times)

    def run(number: int) -> object:
        barrier.wait()
        return action(number)

    with ThreadPoolExecutor(times) as pool:
        return list(pool.map(run, range(times)))


# States


def test_a_delivery_walks_its_states_and_counts_attempts(desk: Desk) -> None:
    desk.plan(delivery())
    assert desk.claim("d")
    desk.deliveries.settle("d", LATER, "retrying", reason="busy", due_at=LATER)
    assert desk.claim("d", "another", LATER)
    desk.deliveries.settle("d", LATER, "ambiguous", reason="no answer")
    found = desk.store.delivery("d")
    assert (found.state, found.attempts, found.reason, found.due_at) == ("ambiguous", 2, "no answer", None)
    assert (found.created_at, found.tried_since, found.updated_at) == (NOW, NOW, LATER)


@pytest.mark.parametrize("state", SETTLED)
def test_what_is_settled_is_not_claimed(state: str, desk: Desk) -> None:
    desk.plan(delivery())
    desk.claim("d")
    desk.deliveries.settle("d", NOW, state)
    assert not desk.claim("d")
    assert desk.store.delivery("d").attempts == 1


def test_what_is_being_sent_is_resent_by_its_own_workflow_only(desk: Desk) -> None:
    desk.plan(delivery())
    assert desk.claim("d", "mine")
    assert not desk.claim("d", "another")
    again = desk.deliveries.claim("d", "mine", NOW)
    assert (again.may_send, again.resent, again.delivery.attempts) == (True, True, 2)


def test_one_of_many_that_claim_at_once_may_send(desk: Desk) -> None:
    desk.plan(delivery())
    allowed = at_once(8, lambda n: desk.claim("d", f"w{n}"))
    assert sorted(map(bool, allowed)) == [False] * 7 + [True]


def test_delivered_stays_delivered(desk: Desk) -> None:
    desk.plan(delivery())
    desk.deliveries.settle("d", NOW, "delivered", receipt="AA")
    for state in ("pending", "retrying", "ambiguous", "dead"):
        after = desk.deliveries.settle("d", LATER, state, reason="late news", due_at=LATER)
        assert (after.state, after.receipt, after.reason, after.due_at) == ("delivered", "AA", "", None)
    desk.plan(delivery(), now=LATER)
    desk.plan(delivery("d2", revision=2), now=LATER)
    assert desk.store.delivery("d").state == "delivered"


def test_delivered_stays_delivered_however_the_answers_race(desk: Desk) -> None:
    states = ["delivered", "retrying", "ambiguous", "dead"]
    for number in range(10):
        name = f"d{number}"
        desk.plan(delivery(name))

        def settle(n: int, name: str = name) -> Delivery:
            return desk.deliveries.settle(name, LATER, states[n])

        at_once(4, settle)
        assert desk.store.delivery(name).state == "delivered"


def test_unknown_deliveries_are_lookup_errors(desk: Desk) -> None:
    for action in (lambda: desk.claim("x"), lambda: desk.deliveries.settle("x", NOW, "dead")):
        with pytest.raises(LookupError, match="no delivery x"):
            action()


# Revisions


def test_planning_again_keeps_states_and_revives_the_dead(desk: Desk) -> None:
    three = [delivery(f"d{n}", position=n) for n in (1, 2, 3)]
    desk.plan(*three)
    desk.deliveries.settle("d1", NOW, "delivered")
    desk.deliveries.settle("d2", NOW, "dead", reason="refused")
    desk.plan(*[delivery(f"d{n}", position=n) for n in (1, 2, 3)], now=LATER)
    found = [(d.delivery_id, d.state, d.reason) for d in desk.store.deliveries(job_id="j")]
    assert found == [("d1", "delivered", ""), ("d2", "pending", ""), ("d3", "pending", "")]


def test_a_newer_revision_retires_what_waits_and_not_what_is_being_sent(desk: Desk) -> None:
    """What is on the wire at that moment may arrive: the newer one waits for its end."""
    desk.plan(delivery("sending"), delivery("waiting", position=1))
    desk.claim("sending")
    desk.plan(delivery("newer", revision=2, created_at=LATER), now=LATER)
    assert desk.store.delivery("waiting").reason == "superseded by revision 2"
    assert not desk.claim("newer", now=LATER)
    desk.deliveries.settle("sending", LATER, "retrying", reason="busy", due_at=LATER)
    after = desk.store.delivery("sending")
    assert (after.state, after.reason, after.due_at) == ("dead", "superseded by revision 2", None)
    assert desk.claim("newer", now=LATER)


def test_other_jobs_keep_their_deliveries(desk: Desk) -> None:
    desk.plan(delivery("other", job_id="other"))
    desk.plan(delivery("d", revision=2))
    assert desk.store.delivery("other").state == "pending"


# Order


def test_an_accession_is_in_order_and_others_are_free(desk: Desk) -> None:
    desk.plan(delivery("first", job_id="a", key="ACC"))
    desk.plan(delivery("second", job_id="b", key="ACC", created_at=LATER))
    desk.plan(delivery("elsewhere", job_id="c", key="OTHER", created_at=LATER))
    desk.plan(delivery("to-ris", job_id="b", key="ACC", destination="ris", created_at=LATER))
    assert not desk.claim("second")
    assert desk.claim("elsewhere")
    assert desk.claim("to-ris")
    held = desk.store.delivery("second")
    assert (held.state, held.attempts, held.due_at) == ("pending", 0, NOW)
    assert held.reason == "waits its turn: seg.dcm of another study with the same accession number is pending"
    assert desk.due() == []
    assert desk.claim("first")
    desk.deliveries.settle("first", NOW, "delivered")
    assert desk.due() == ["second"]
    assert desk.claim("second")


@pytest.mark.parametrize(("state", "wait", "may"), [("dead", False, True), ("ambiguous", False, True)])
def test_what_waits_for_a_person_holds_up_nobody(state: str, wait: bool, may: bool, desk: Desk) -> None:
    desk.plan(delivery("first", key="ACC"), delivery("second", key="ACC", position=1))
    desk.deliveries.settle("first", NOW, state)
    assert desk.claim("second", wait_for_ambiguous=wait) is may


def test_an_ambiguous_one_holds_up_its_accession_where_the_site_wants_that(desk: Desk) -> None:
    desk.plan(delivery("first", key="ACC"), delivery("second", key="ACC", position=1))
    desk.deliveries.settle("first", NOW, "ambiguous")
    assert not desk.claim("second", wait_for_ambiguous=True)
    assert "is ambiguous" in desk.store.delivery("second").reason


def test_of_many_at_once_the_first_of_its_accession_goes(desk: Desk) -> None:
    for n in range(8):
        desk.plan(delivery(f"d{n}", job_id=f"j{n}", key="ACC", created_at=NOW + timedelta(seconds=n)))
    allowed = at_once(8, lambda n: desk.claim(f"d{n}", f"w{n}"))
    assert allowed == [True] + [False] * 7


def test_the_urgent_are_due_first_and_what_is_handed_over_is_due_no_more(desk: Desk) -> None:
    for n, priority in enumerate((4, 1, 3)):
        desk.plan(delivery(f"d{n}", job_id=f"j{n}", priority=priority, due_at=NOW))
    desk.plan(delivery("later", job_id="later", due_at=LATER + timedelta(seconds=1)))
    assert desk.due() == ["d1", "d2", "d0"]
    first = desk.store.delivery("d1")
    desk.deliveries.handed_over(first)
    assert desk.due() == ["d2", "d0"]
    assert [d.delivery_id for d in desk.deliveries.due(LATER, job_id="j0")] == ["d0"]


def test_what_was_put_off_again_meanwhile_stays_due(desk: Desk) -> None:
    desk.plan(delivery("d", due_at=NOW))
    stale = desk.store.delivery("d")
    desk.claim("d")
    desk.deliveries.settle("d", NOW, "retrying", due_at=NOW + timedelta(seconds=1))
    desk.deliveries.handed_over(stale)
    assert desk.due() == ["d"]


# Destinations


def test_a_destination_is_down_after_so_many_failures_in_a_row(desk: Desk) -> None:
    three = DestinationSettings(down_after=3, probe_every_s=30, longest_wait_s=100)
    health = desk.deliveries.health("pacs")
    for _ in range(2):
        note_failure(health, "busy", NOW, three)
    note_answer(health)
    for _ in range(2):
        note_failure(health, "busy", NOW, three)
    assert health.down_since is None
    note_failure(health, "busy", NOW, three)
    assert (health.down_since, health.probe_at) == (NOW, NOW + timedelta(seconds=30))
    waits = []
    for _ in range(3):  # it answers its probe, and not what is sent
        note_failure(health, "busy", LATER, three)
        waits.append((health.probe_at - LATER).total_seconds())  # type: ignore[operator]
    assert waits == [60, 100, 100]
    assert health.down_since == NOW


def test_nothing_goes_to_a_destination_that_is_down_but_the_trial(desk: Desk) -> None:
    for name in ("a", "b", "c"):
        desk.plan(delivery(name, job_id=name))
    desk.plan(delivery("ris", job_id="r", destination="ris"))
    desk.bring_down("pacs", by="a")
    assert not desk.claim("b")
    held = desk.store.delivery("b")
    assert (held.state, held.attempts) == ("pending", 0)
    assert held.reason == "pacs is down since 2026-03-04 10:30:00 UTC and is being probed (no connection)"
    assert desk.claim("ris")
    assert desk.due() == []
    assert not desk.deliveries.take_probe("pacs", NOW, LATER)
    assert desk.deliveries.take_probe("pacs", NOW + timedelta(seconds=30), LATER)
    assert not desk.deliveries.take_probe("pacs", NOW + timedelta(seconds=31), LATER)
    trial = desk.deliveries.choose_trial("pacs", LATER)
    assert trial is not None
    assert trial.delivery_id == "b", "not the one that failed before"
    assert not desk.claim("a")
    assert desk.claim("b")
    desk.deliveries.settle("b", LATER, "delivered", health=note_answer)
    assert desk.deliveries.health("pacs").down_since is None
    assert desk.due() == ["a"]


def test_a_destination_for_which_nothing_waits_is_well_again_once_it_answers(desk: Desk) -> None:
    desk.plan(delivery())
    desk.bring_down("pacs", by="d")
    desk.deliveries.settle("d", NOW, "dead")
    assert desk.deliveries.choose_trial("pacs", LATER, "some other job") is None
    assert desk.deliveries.health("pacs").down_since is not None
    assert desk.deliveries.choose_trial("pacs", LATER) is None
    assert desk.deliveries.health("pacs").down_since is None


def test_a_wish_to_be_left_alone_holds_for_all_and_makes_nothing_down(desk: Desk) -> None:
    desk.plan(delivery("a", job_id="a"))
    desk.plan(delivery("b", job_id="b"))
    desk.claim("a")
    wish = partial(note_wish, wait_s=60.0, now=NOW)
    desk.deliveries.settle("a", NOW, "retrying", due_at=NOW + timedelta(seconds=60), health=wish)
    assert not desk.claim("b")
    held = desk.store.delivery("b")
    assert held.due_at == NOW + timedelta(seconds=60)
    assert held.reason == "pacs asked not to be sent anything until 2026-03-04 10:31:00 UTC"
    assert desk.due(NOW + timedelta(seconds=59)) == []
    assert sorted(desk.due(NOW + timedelta(seconds=60))) == ["a", "b"]
    assert desk.deliveries.health("pacs").down_since is None


# People


def word(reason: str = "mended", at: datetime = LATER) -> Word:
    return Word("kim", reason, at)


@pytest.mark.parametrize("state", ["dead", "ambiguous", "retrying"])
def test_a_person_has_it_tried_again_at_once(state: str, desk: Desk) -> None:
    desk.plan(delivery())
    desk.claim("d")
    desk.deliveries.settle("d", NOW, state, reason="x", due_at=None)
    after = retry_delivery(desk.deliveries, desk.store.delivery("d"), word())
    assert (after.state, after.reason, after.due_at, after.tried_since) == ("pending", "", LATER, None)
    assert desk.due() == ["d"]
    (decision,) = desk.store.decisions("j")
    assert (decision.action, decision.person, decision.reason) == ("retry", "kim", "mended")


def test_what_arrived_or_is_being_sent_or_replaced_is_not_tried_again(desk: Desk) -> None:
    desk.plan(delivery("arrived"), delivery("sending", position=1), delivery("old", position=2))
    desk.deliveries.settle("arrived", NOW, "delivered")
    desk.claim("sending")
    desk.deliveries.settle("old", NOW, "ambiguous")
    for name, why in (("arrived", "delivered already"), ("sending", "being sent")):
        with pytest.raises(NotDeliverable, match=why):
            retry_delivery(desk.deliveries, desk.store.delivery(name), word())
    desk.plan(delivery("new", revision=2), now=LATER)
    with pytest.raises(NotDeliverable, match="revision 2 of this result goes instead"):
        retry_delivery(desk.deliveries, desk.store.delivery("old"), word())
    assert desk.store.decisions("j") == []


def test_a_decision_needs_a_person_and_a_reason(desk: Desk) -> None:
    desk.plan(delivery(state="dead"))
    for nothing in (Word(" ", "x", NOW), Word("kim", " ", NOW)):
        with pytest.raises(NotDeliverable, match="person and a reason"):
            retry_delivery(desk.deliveries, desk.store.delivery("d"), nothing)


def test_an_ambiguous_one_is_settled_by_a_persons_word(desk: Desk) -> None:
    desk.plan(delivery(state="ambiguous"), delivery("dead", state="dead", position=1))
    after = settle_delivered(desk.deliveries, desk.store.delivery("d"), word("seen in the worklist"))
    assert (after.state, after.receipt) == ("delivered", "kim found it at the destination: seen in the worklist")
    with pytest.raises(NotDeliverable, match="it is dead"):
        settle_delivered(desk.deliveries, desk.store.delivery("dead"), word())


def test_a_delivery_is_found_by_the_beginning_of_its_id(desk: Desk) -> None:
    desk.plan(delivery("abc1"), delivery("abd2"))
    assert desk.deliveries.find("abc").delivery_id == "abc1"
    for prefix, why in (("ab", "more than one"), ("x", "no delivery"), ("", "no delivery"), ("a%", "no delivery")):
        with pytest.raises(LookupError, match=why):
            desk.deliveries.find(prefix)


# Replay


@pytest.fixture
def released(desk: Desk) -> StudyJob:
    event = {"idempotency_key": "k", "source": "s", "kind": "x", "study_instance_uid": "1.2", "job_id": "j"}
    desk.store.accept_event(StudyEvent(**event, received_at=NOW))
    for position, kind in enumerate(("seg", "sr")):
        record = ArtifactRecord(
            artifact_id=f"j/1/{position}",
            job_id="j",
            revision=1,
            name=f"{kind}.dcm",
            kind=kind,
            media_type="x",
            digest="0" * 64,
            size_bytes=1,
        )
        desk.store.save_artifacts([record])
    desk.store.update_job("j", NOW, state="released", facts={"findings": "f"})
    return desk.store.job("j")


def replay(desk: Desk, job: StudyJob, wish: Replay, at: datetime = LATER, to: tuple[str, ...] = ("pacs",)) -> list[str]:
    outputs = Outputs(pacs=("seg", "sr"), ehr=("sr",), ris=())
    going = replay_result(desk.store, desk.deliveries, job, outputs, to, wish, word("lost", at))
    return [f"{d.artifact_name} to {d.destination}" for d in going]


def test_replay_sends_what_was_never_sent_or_is_dead_and_nothing_twice(desk: Desk, released: StudyJob) -> None:
    assert replay(desk, released, Replay()) == ["seg.dcm to pacs", "sr.dcm to pacs"]
    assert replay(desk, released, Replay(), LATER + timedelta(1)) == []
    seg, sr = desk.store.deliveries(job_id="j")
    desk.deliveries.settle(seg.delivery_id, LATER, "delivered")
    desk.deliveries.settle(sr.delivery_id, LATER, "dead")
    assert replay(desk, released, Replay(), LATER + timedelta(2)) == ["sr.dcm to pacs"]
    assert replay(desk, released, Replay("ehr"), LATER + timedelta(3), ("pacs", "ehr")) == ["sr.dcm to ehr"]
    with pytest.raises(NotDeliverable, match="ris is not configured"):
        replay(desk, released, Replay("ris"))


def test_replay_again_sends_what_arrived_once_for_each_wish(desk: Desk, released: StudyJob) -> None:
    replay(desk, released, Replay())
    for each in desk.store.deliveries(job_id="j"):
        desk.deliveries.settle(each.delivery_id, LATER, "delivered", receipt="stored")
    wish = Replay(again=True, key="archive lost a disk")
    assert replay(desk, released, wish, LATER + timedelta(hours=1)) == ["seg.dcm to pacs", "sr.dcm to pacs"]
    assert replay(desk, released, wish, LATER + timedelta(1)) == []
    everything = desk.store.deliveries(job_id="j")
    assert [d.state for d in everything] == ["delivered", "delivered", "pending", "pending"]
    assert {d.digest for d in everything} == {"0" * 64}
    assert everything[-1].replay == "sent again for kim: lost"
    other = Replay(again=True, key="another wish")
    assert len(replay(desk, released, other, LATER + timedelta(2))) == 2


def test_what_was_never_released_is_not_sent(desk: Desk, released: StudyJob) -> None:
    released.facts = {}
    with pytest.raises(NotDeliverable, match="never released"):
        replay(desk, released, Replay())


def test_the_list_fits_a_hundred_columns_and_tells_why_each_waits(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "key-images/a-lesion-with-a-very-long-name-indeed-t2w.dcm"
    desk.plan(delivery("a", job_id="a", artifact_name=name), now=NOW)
    desk.plan(delivery("b", job_id="b"))
    desk.bring_down("pacs", by="a")
    print_rows(desk.deliveries.search(), desk.deliveries.healths(), Console(width=100))
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 100
    assert "no connection" in told
    assert "pacs is down since 2026-03-04 10:30:00 UTC (no connection)" in told
