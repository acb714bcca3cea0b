"""Deliveries on their way: who may send what now, what came of it, and whether each destination answers.

Each method is one transaction, so that any number of workers may ask at once.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Engine, and_, exists, or_, tuple_
from sqlalchemy.orm import aliased
from sqlmodel import Session, col, select

from middleware.store.queries import changing
from middleware.store.tables import Decision, Delivery, DestinationHealth

SETTLED = ("delivered", "dead", "ambiguous")
WAITING = ("pending", "retrying")
_UNSETTLED = (*WAITING, "in_flight")

Health = Callable[[DestinationHealth], None]
"""Changes what is known of a destination, inside the transaction that asks it to."""


@dataclass(frozen=True)
class Claim:
    """Whether a delivery may be sent now; `resent` says that an earlier try may have reached the destination. Of one
    that may not, the delivery says why."""

    delivery: Delivery
    may_send: bool
    resent: bool = False


@dataclass(frozen=True)
class _Hold:
    reason: str
    until: datetime


class DeliveryStore:
    """Deliveries and destinations. Methods take and give table rows, detached and safe to read."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def _reading(self) -> Session:
        return Session(self._engine, expire_on_commit=False)

    # One delivery

    def claim(self, delivery_id: str, workflow: str, now: datetime, *, wait_for_ambiguous: bool = False) -> Claim:
        """Mark a delivery in flight for this workflow, unless it must wait: for an earlier one of its order, or for
        its destination. Then it keeps its state, with the reason. LookupError if there is none."""
        with changing(self._engine) as session:
            delivery, others = _lock_order(session, delivery_id)
            if delivery.state in SETTLED:
                return Claim(delivery, may_send=False)
            if resent := delivery.state == "in_flight":
                if delivery.claimed_by != workflow:
                    return Claim(delivery, may_send=False)
            elif hold := _hold(session, delivery, others, now, wait_for_ambiguous):
                delivery.reason, delivery.due_at, delivery.updated_at = hold.reason, hold.until, now
                return Claim(delivery, may_send=False)
            delivery.state, delivery.claimed_by, delivery.due_at = "in_flight", workflow, None
            delivery.attempts += 1
            delivery.tried_since = delivery.tried_since or now
            delivery.updated_at = now
            return Claim(delivery, may_send=True, resent=resent)

    def settle(
        self,
        delivery_id: str,
        now: datetime,
        state: str,
        *,
        receipt: str = "",
        reason: str = "",
        due_at: datetime | None = None,
        health: Health | None = None,
    ) -> Delivery:
        """Remember how an attempt ended, and what it says of the destination. What was delivered stays delivered; what
        would be tried again is dead where a newer revision goes instead. LookupError if there is no such delivery."""
        with changing(self._engine) as session:
            delivery = _get(session, delivery_id, for_update=True)
            if delivery.state != "delivered":
                newer = _newer_revision(session, delivery) if state == "retrying" else None
                if newer:
                    state, reason, due_at = "dead", f"superseded by revision {newer}", None
                delivery.state, delivery.receipt, delivery.reason = state, receipt, reason
                delivery.due_at, delivery.claimed_by, delivery.updated_at = due_at, "", now
            if health:
                health(_health(session, delivery.destination))
            return delivery

    def newer_revision(self, delivery: Delivery) -> int | None:
        """The newest later revision of the same job that was planned; None where this is the newest."""
        with self._reading() as session:
            return _newer_revision(session, delivery)

    def find(self, prefix: str) -> Delivery:
        """The one delivery whose id begins so. LookupError where there is none, or more than one."""
        with self._reading() as session:
            query = select(Delivery).where(col(Delivery.delivery_id).startswith(prefix, autoescape=True))
            found = session.exec(query.limit(2)).all() if prefix else []
            if len(found) != 1:
                raise LookupError(
                    f"{'more than one delivery begins' if found else 'no delivery begins'} with '{prefix}'"
                )
            return found[0]

    def search(
        self,
        *,
        state: str = "",
        destination: str = "",
        job_ids: Collection[str] | None = None,
        limit: int | None = None,
    ) -> list[Delivery]:
        """Deliveries that match, in the order in which they were planned."""
        query = select(Delivery)
        query = query.where(Delivery.state == state) if state else query
        query = query.where(Delivery.destination == destination) if destination else query
        query = query.where(col(Delivery.job_id).in_(job_ids)) if job_ids is not None else query
        order = (col(Delivery.created_at), col(Delivery.job_id), col(Delivery.destination), col(Delivery.position))
        with self._reading() as session:
            return list(session.exec(query.order_by(*order).limit(limit)))

    def decide(self, decision: Decision, delivery_id: str, apply: Callable[[Delivery], None]) -> Delivery:
        """Remember a person's decision together with what it changes of a delivery; neither where `apply` raises, and
        nothing where the decision is known already."""
        with changing(self._engine) as session:
            delivery = _get(session, delivery_id, for_update=True)
            if session.get(Decision, decision.decision_id) is None:
                apply(delivery)
                delivery.updated_at = decision.decided_at
                session.add(decision)
            return delivery

    def plan_again(self, decision: Decision, planned: Collection[Delivery], revive: Collection[str]) -> list[Delivery]:
        """Remember deliveries that a person wants again: what is new is pending, what is there already stays as it is,
        except that the states in `revive` become pending. Gives those that go now; none where the decision is known."""
        with changing(self._engine) as session:
            if session.get(Decision, decision.decision_id) is not None:
                return []
            going = []
            for delivery in planned:
                known = session.get(Delivery, delivery.delivery_id, with_for_update=True)
                if known is None:
                    session.add(delivery)
                    going.append(delivery)
                elif known.state in revive:
                    make_pending(known, decision.decided_at)
                    going.append(known)
            session.add(decision)
            return going

    # What goes next

    def due(self, now: datetime, limit: int = 100, *, job_id: str = "") -> list[Delivery]:
        """Deliveries that may go now, the most urgent first: each the first of its order, to a destination that
        answers."""
        health = DestinationHealth
        is_barred = exists().where(
            col(health.destination) == Delivery.destination,
            or_(col(health.down_since).is_not(None), col(health.hold_until) > now),
        )
        urgent_first = (col(Delivery.priority), col(Delivery.created_at), col(Delivery.delivery_id))
        with self._reading() as session:
            query = select(Delivery).where(~is_barred, *_first_and_due(now), *_of_job(job_id))
            return list(session.exec(query.order_by(*urgent_first).limit(limit)))

    def handed_over(self, delivery: Delivery) -> None:
        """Note that a workflow has this delivery; nothing where it changed since it was found due."""
        with changing(self._engine) as session:
            found = _get(session, delivery.delivery_id, for_update=True)
            if found.due_at == delivery.due_at:
                found.due_at = None

    # Destinations

    def health(self, destination: str) -> DestinationHealth:
        """What is known of a destination; one that was never heard of is well."""
        with self._reading() as session:
            return session.get(DestinationHealth, destination) or DestinationHealth(destination=destination)

    def healths(self) -> dict[str, DestinationHealth]:
        """What is known of every destination that was ever tried, by its name."""
        with self._reading() as session:
            return {each.destination: each for each in session.exec(select(DestinationHealth))}

    def take_probe(self, destination: str, now: datetime, next_at: datetime) -> bool:
        """Whether the caller is to probe the destination now; nobody else does until `next_at`."""
        with changing(self._engine) as session:
            found = _health(session, destination)
            if found.down_since is None or (found.probe_at is not None and found.probe_at > now):
                return False
            found.probe_at = next_at
            return True

    def choose_trial(self, destination: str, now: datetime, job_id: str = "") -> Delivery | None:
        """The delivery that goes alone to a destination that answers its probe: one that was tried least, or the same
        hopeless one would keep it down. None where nothing waits (of the job, where one is named); where nothing does
        at all, the destination counts as well again."""
        with changing(self._engine) as session:
            query = select(Delivery).where(Delivery.destination == destination, *_first_and_due(now), *_of_job(job_id))
            order = (col(Delivery.attempts), col(Delivery.priority), col(Delivery.created_at))
            chosen = session.exec(query.order_by(*order).limit(1)).first()
            found = _health(session, destination)
            if chosen is not None:
                found.trial = chosen.delivery_id
            elif not job_id:
                found.failures, found.down_since, found.probe_at, found.trial = 0, None, None, ""
            return chosen


def make_pending(delivery: Delivery, now: datetime) -> None:
    """Have a delivery tried as if it never had been, as soon as may be; inside the caller's transaction."""
    delivery.state, delivery.reason, delivery.claimed_by = "pending", "", ""
    delivery.tried_since, delivery.due_at, delivery.updated_at = None, now, now


def _get(session: Session, delivery_id: str, *, for_update: bool = False) -> Delivery:
    delivery = session.get(Delivery, delivery_id, with_for_update=for_update or None)
    if delivery is None:
        raise LookupError(f"no delivery {delivery_id}")
    return delivery


def _health(session: Session, destination: str) -> DestinationHealth:
    found = session.get(DestinationHealth, destination, with_for_update=True)
    if found is None:
        found = DestinationHealth(destination=destination)
        session.add(found)
    return found


def _place(delivery: Any) -> tuple[Any, Any, Any, Any]:
    """What orders deliveries of one order key."""
    return delivery.created_at, delivery.revision, delivery.position, delivery.delivery_id


def _lock_order(session: Session, delivery_id: str) -> tuple[Delivery, list[Delivery]]:
    """The delivery, and those of its order that are not delivered; all locked, in one order for everybody."""
    delivery = _get(session, delivery_id)
    if delivery.state in SETTLED:
        return delivery, []
    same = select(Delivery).where(
        Delivery.destination == delivery.destination,
        Delivery.order_key == delivery.order_key,
        or_(col(Delivery.state).in_((*_UNSETTLED, "ambiguous")), col(Delivery.delivery_id) == delivery_id),
    )
    ordered = same.order_by(col(Delivery.created_at), col(Delivery.delivery_id)).with_for_update()
    rows = session.exec(ordered.execution_options(populate_existing=True)).all()
    return delivery, [row for row in rows if row.delivery_id != delivery_id]


def _hold(
    session: Session, delivery: Delivery, others: Collection[Delivery], now: datetime, wait_for_ambiguous: bool
) -> _Hold | None:
    states = (*_UNSETTLED, "ambiguous") if wait_for_ambiguous else _UNSETTLED
    earlier = [each for each in others if each.state in states and _place(each) < _place(delivery)]
    if earlier:
        first = min(earlier, key=_place)
        what = f"{first.artifact_name} of {'this study' if first.job_id == delivery.job_id else 'another study'}"
        return _Hold(f"waits its turn: {what} with the same accession number is {first.state}", now)
    health = session.get(DestinationHealth, delivery.destination)
    if health is None:
        return None
    if health.down_since is not None and health.trial != delivery.delivery_id:
        since = f"{health.down_since:%Y-%m-%d %H:%M:%S} UTC"
        return _Hold(f"{delivery.destination} is down since {since} and is being probed ({health.reason})", now)
    if health.hold_until is not None and health.hold_until > now:
        until = f"{health.hold_until:%Y-%m-%d %H:%M:%S} UTC"
        return _Hold(f"{delivery.destination} asked not to be sent anything until {until}", health.hold_until)
    return None


def _newer_revision(session: Session, delivery: Delivery) -> int | None:
    query = select(Delivery.revision).where(
        Delivery.job_id == delivery.job_id, col(Delivery.revision) > delivery.revision
    )
    return session.exec(query.order_by(col(Delivery.revision).desc()).limit(1)).first()


def _first_and_due(now: datetime) -> tuple[ColumnElement[bool], ...]:
    """Deliveries that are due, and first among those of their order that are not settled."""
    earlier = aliased(Delivery)
    is_behind = exists().where(
        and_(
            col(earlier.destination) == Delivery.destination,
            col(earlier.order_key) == Delivery.order_key,
            col(earlier.state).in_(_UNSETTLED),
            tuple_(*_place(earlier)) < tuple_(*_place(Delivery)),
        )
    )
    return (col(Delivery.due_at) <= now, col(Delivery.state).in_(WAITING), ~is_behind)


def _of_job(job_id: str) -> tuple[ColumnElement[bool], ...]:
    return (col(Delivery.job_id) == job_id,) if job_id else ()
