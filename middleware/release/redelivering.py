"""What people decide about deliveries: try again, take as arrived, send a released result again.

Every decision is kept with its person and reason; the same decision again has no further effect.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

from mappings.model.ids import derive_uuid
from mappings.model.protocol import Outputs
from middleware import telemetry
from middleware.release.deliveries import DESTINATIONS, ROUTINE, Errand, plan_deliveries
from middleware.store.deliveries import DeliveryStore, make_pending
from middleware.store.queries import Store
from middleware.store.tables import Decision, Delivery, StudyJob


class NotDeliverable(Exception):
    """The delivery or result is not in a state that a person can decide about so; the message says which and what
    else to do."""


@dataclass(frozen=True)
class Word:
    """A person's word: who, why and when."""

    person: str
    reason: str
    at: datetime

    def decision(self, job_id: str, action: str, *name: str) -> Decision:
        """The word as it is kept. `name` tells decisions of one kind apart; the same name is the same decision."""
        person, reason = self.person.strip(), self.reason.strip()
        if not person or not reason:
            raise NotDeliverable("a decision needs a person and a reason")
        return Decision(
            decision_id=str(derive_uuid("decision", job_id, action, *name)),
            job_id=job_id,
            person=person,
            action=action,
            reason=reason,
            decided_at=self.at,
        )


def retry_delivery(deliveries: DeliveryStore, delivery: Delivery, word: Word) -> Delivery:
    """Have a delivery tried (again) as soon as may be. Raises NotDeliverable for one that arrived, that is being sent,
    or that a newer revision replaces: no system may see an older result after a newer one."""
    newer = deliveries.newer_revision(delivery)

    def apply(row: Delivery) -> None:
        _refuse_if(row.state == "delivered", "it was delivered already; `wetread replay --again` sends it again")
        _refuse_if(row.state == "in_flight", "it is being sent at this moment; wait for its end")
        _refuse_if(newer is not None, f"revision {newer} of this result goes instead; see to that one")
        make_pending(row, word.at)

    return _decide(deliveries, delivery, "retry", word, apply)


def settle_delivered(deliveries: DeliveryStore, delivery: Delivery, word: Word) -> Delivery:
    """Take an ambiguous delivery as arrived, because a person looked at the destination. Raises NotDeliverable for one
    that is not ambiguous."""

    def apply(row: Delivery) -> None:
        _refuse_if(row.state != "ambiguous", f"it is {row.state}; only an ambiguous one is settled by a person's word")
        row.state, row.due_at, row.reason = "delivered", None, ""
        row.receipt = f"{word.person.strip()} found it at the destination: {word.reason.strip()}"

    return _decide(deliveries, delivery, "delivered", word, apply)


def _refuse_if(is_so: bool, why: str) -> None:
    if is_so:
        raise NotDeliverable(why)


def _decide(
    deliveries: DeliveryStore, delivery: Delivery, action: str, word: Word, apply: Callable[[Delivery], None]
) -> Delivery:
    decision = word.decision(delivery.job_id, action, delivery.delivery_id, word.at.isoformat())
    decided = deliveries.decide(decision, delivery.delivery_id, apply)
    telemetry.log("decision", job_id=delivery.job_id, destination=delivery.destination, kind=action)
    return decided


# Replay


@dataclass(frozen=True)
class Replay:
    """What is to be sent again of a released result: to one destination or (empty) to all; `again`: also what was
    delivered, or may have been, under a `key` that names this wish. The same key again is the same wish."""

    destination: str = ""
    again: bool = False
    key: str = ""


def replay_result(
    store: Store,
    deliveries: DeliveryStore,
    job: StudyJob,
    outputs: Outputs,
    configured: Collection[str],
    wish: Replay,
    word: Word,
) -> list[Delivery]:
    """Send the released revision of a result again, with the same bytes and ids, and give the deliveries that go: those
    that were never made or are dead and, with `again`, all. Raises NotDeliverable where nothing was released."""
    if "findings" not in job.facts:
        raise NotDeliverable(f"the study is {job.state} and was never released: there is nothing to send")
    to = [d for d in DESTINATIONS if d in configured and wish.destination in ("", d)]
    _refuse_if(not to, f"{wish.destination or 'no destination'} is not configured")
    known = [d for d in store.deliveries(job_id=job.job_id) if d.revision == job.revision and not d.replay]
    planned = plan_deliveries(_errand(job, known), outputs, to, store.artifacts(job.job_id, job.revision), word.at)
    for delivery in planned:
        delivery.due_at = word.at
    if wish.again:
        planned = _anew(planned, known, wish, word)
    name = ("again", wish.key) if wish.again else (word.at.isoformat(),)
    decision = word.decision(job.job_id, "replay", str(job.revision), wish.destination, *name)
    going = deliveries.plan_again(decision, planned, revive=("dead",))
    telemetry.log("decision", job_id=job.job_id, kind="replay", count=len(going))
    return going


def _errand(job: StudyJob, known: Sequence[Delivery]) -> Errand:
    order_key = known[0].order_key if known else job.job_id
    priority = known[0].priority if known else ROUTINE
    return Errand(job.job_id, job.revision, order_key, priority)


def _anew(planned: Sequence[Delivery], known: Sequence[Delivery], wish: Replay, word: Word) -> list[Delivery]:
    """Deliveries of their own in the place of those that may have arrived, named by the wish: the same wish again names
    the same ones. Those that are still on their way are left to arrive."""
    if not wish.key:
        raise NotDeliverable("sending again what was delivered needs a key that names this wish")
    states = {d.delivery_id: d.state for d in known}
    anew = []
    for delivery in planned:
        state = states.get(delivery.delivery_id, "")
        if state in ("pending", "in_flight", "retrying"):
            continue
        if state in ("delivered", "ambiguous"):
            delivery.delivery_id = str(derive_uuid("replay", delivery.delivery_id, wish.key))
            delivery.replay = f"sent again for {word.person.strip()}: {word.reason.strip()}"
        anew.append(delivery)
    return anew
