"""Keeping messages and what they say. Keeping is one transaction for all that came together, so that many senders
share one fsync; applying is one transaction a message, so that it happens once."""

import hashlib
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Engine, and_, func, or_
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import Session, SQLModel, col, select

from middleware.store.heard import HeardMessage, OrderRecord, PatientRecord, RefusedNumber, ReportRecord
from middleware.store.issuers import Issuers, are_other_issuers, are_same_issuer, may_be_same_issuer
from middleware.store.queries import changing

FINAL = ("F", "C")
"""OBR-25 of a report that a radiologist stands behind."""
UNWANTED = ("cancelled", "discontinued")
"""Statuses of an order that nobody wants carried out."""


@dataclass(frozen=True)
class Arrived:
    """A message that came, to be kept as the `HeardMessage` of these columns; a plain object, since many come at
    once. `notes` are what was odd about it. `message_key` is the digest of `raw` unless it is given."""

    raw: bytes
    sender: str
    control_id: str
    message_type: str
    state: Literal["received", "unreadable"]
    notes: list[str]
    received_at: datetime
    format: Literal["hl7", "fhir"] = "hl7"
    message_key: str = ""

    def __post_init__(self) -> None:
        if not self.message_key:
            object.__setattr__(self, "message_key", hashlib.sha256(self.raw).hexdigest())


@dataclass(frozen=True)
class Kept:
    """What keeping a message found: `new`, or `repeated` (the same was kept before)."""

    outcome: Literal["new", "repeated"]
    position: int


class HearingStore:
    """The tables of `heard.py`. `issuers` are the authorities that the site has listed: questions about a patient of
    images name the authority in DICOM's words, messages in HL7's."""

    def __init__(self, engine: Engine, issuers: Issuers = ()) -> None:
        self._engine = engine
        self._issuers = issuers
        SQLModel.metadata.create_all(engine)
        self._keeping = _write_upsert(engine)
        # SQLite has one writer; who waits for it inside this process wakes at once, instead of looking now and then.
        self._turn = threading.Lock()

    @contextmanager
    def changing(self) -> Iterator[Session]:
        """One transaction that reads before it writes, committed at the end."""
        with self._turn, changing(self._engine) as session:
            yield session

    def keep(self, arrived: Sequence[Arrived]) -> list[Kept]:
        """Keep messages durably, in their order; one answer each. One statement for all, since senders wait."""
        keys = [message.message_key for message in arrived]
        rows: dict[str, dict[str, Any]] = {}
        for key, message in zip(keys, arrived, strict=True):
            if key in rows:
                rows[key]["repeats"] += 1
            else:
                rows[key] = {**vars(message), "repeats": 0}
        with self._turn, self._engine.begin() as connection:
            kept = {row.message_key: row for row in connection.execute(self._keeping, list(rows.values()))}
        seen: set[str] = set()
        answers = []
        for key in keys:
            is_new = key not in seen and kept[key].repeats == rows[key]["repeats"]
            seen.add(key)
            answers.append(Kept("new" if is_new else "repeated", kept[key].position))
        return answers

    def keys_kept(self, keys: Collection[str]) -> set[str]:
        """Which of these message keys are in the inbox."""
        with Session(self._engine) as session:
            return set(session.exec(select(HeardMessage.message_key).where(col(HeardMessage.message_key).in_(keys))))

    def pending(self, limit: int = 200) -> list[int]:
        """Positions of messages that are not applied yet, in the order in which they came."""
        with Session(self._engine) as session:
            query = select(HeardMessage.position).where(HeardMessage.state == "received")
            return [p for p in session.exec(query.order_by(col(HeardMessage.position)).limit(limit)) if p is not None]

    def apply(self, positions: Sequence[int], change: Callable[[Session, HeardMessage], None]) -> None:
        """Let `change` apply messages in this order and set their states, all in one transaction; nothing to those
        that were applied before."""
        with self.changing() as session:
            for position in positions:
                message = session.get(HeardMessage, position)
                if message is not None and message.state == "received":
                    change(session, message)
                    session.add(message)

    def was_control_id_used(self, session: Session, message: HeardMessage) -> bool:
        """Whether the sender of a message used its control id before, for other content."""
        earlier = select(HeardMessage.position).where(
            HeardMessage.control_id == message.control_id,
            HeardMessage.sender == message.sender,
            col(HeardMessage.position) < message.position,
        )
        return bool(message.control_id) and session.exec(earlier.limit(1)).first() is not None

    def message(self, position: int) -> HeardMessage:
        """The message; LookupError if there is none."""
        with Session(self._engine) as session:
            found = session.get(HeardMessage, position)
            if found is None:
                raise LookupError(f"no message {position}")
            return found

    def count_by_state(self) -> dict[str, int]:
        """How many messages are in each state."""
        with Session(self._engine) as session:
            query = select(HeardMessage.state, func.count()).group_by(HeardMessage.state)
            return dict(session.exec(query.order_by(HeardMessage.state)).all())

    def orders_of_study(self, study_instance_uid: str, accession_number: str = "") -> list[OrderRecord]:
        """Every order that names this study or accession number, the latest change first."""
        named = col(OrderRecord.study_instance_uid) == study_instance_uid
        if accession_number:
            named = or_(named, col(OrderRecord.accession_number) == accession_number)
        with Session(self._engine, expire_on_commit=False) as session:
            return list(session.exec(select(OrderRecord).where(named).order_by(col(OrderRecord.updated_at).desc())))

    def refused_about(self, numbers: Collection[tuple[str, str]]) -> list[HeardMessage]:
        """Messages that were refused and name one of these numbers (kind and number), in the order they came."""
        named = [and_(col(RefusedNumber.kind) == k, col(RefusedNumber.number) == n) for k, n in numbers if n]
        with Session(self._engine, expire_on_commit=False) as session:
            positions = select(RefusedNumber.position).where(or_(*named)) if named else ()
            query = select(HeardMessage).where(col(HeardMessage.position).in_(positions))
            return list(session.exec(query.order_by(col(HeardMessage.position))))

    def orders_to_look_for(self, now: datetime, since: datetime, limit: int = 50) -> list[OrderRecord]:
        """Orders whose study is to be looked for in the PACS by now: wanted by somebody, not on hold, with a number to
        look by, changed since `since` and not handed on since they changed."""
        with Session(self._engine, expire_on_commit=False) as session:
            query = select(OrderRecord).where(
                col(OrderRecord.look_after) <= now,
                col(OrderRecord.updated_at) >= since,
                col(OrderRecord.status).not_in(UNWANTED),
                col(OrderRecord.is_on_hold).is_(False),
                or_(col(OrderRecord.study_instance_uid) != "", col(OrderRecord.accession_number) != ""),
            )
            # The latest first: what is looked for in vain for weeks must not keep what was told just now waiting.
            return list(session.exec(query.order_by(col(OrderRecord.updated_at).desc()).limit(limit)))

    def looked_for(
        self, order: OrderRecord, now: datetime, look_after: datetime | None, *, is_found: bool = False
    ) -> None:
        """Remember that an order's study was looked for, and when to look again (None: no more). Nothing where the
        order changed meanwhile, so that it is looked for as it is now."""
        with self.changing() as session:
            known = session.get(OrderRecord, order.order_id)
            if known is not None and known.updated_at == order.updated_at:
                known.look_after = look_after
                known.handed_at = now if is_found and not known.handed_at else known.handed_at
                session.add(known)

    def final_reports(self, study_instance_uid: str, accession_number: str) -> list[ReportRecord]:
        """The radiologist's own final (or corrected) reports on a study, the latest change first."""
        named = col(ReportRecord.study_instance_uid) == study_instance_uid
        if accession_number:
            named = or_(named, col(ReportRecord.accession_number) == accession_number)
        with Session(self._engine, expire_on_commit=False) as session:
            query = select(ReportRecord).where(named, col(ReportRecord.status).in_(FINAL))
            return list(session.exec(query.order_by(col(ReportRecord.updated_at).desc())))

    def reports_to_tell(self, since: datetime, limit: int = 50) -> list[ReportRecord]:
        """Final reports changed since then that no result was told of, the latest first."""
        with Session(self._engine, expire_on_commit=False) as session:
            query = select(ReportRecord).where(
                col(ReportRecord.status).in_(FINAL),
                col(ReportRecord.updated_at) >= since,
                or_(col(ReportRecord.told_at).is_(None), col(ReportRecord.told_at) < col(ReportRecord.updated_at)),
            )
            return list(session.exec(query.order_by(col(ReportRecord.updated_at).desc()).limit(limit)))

    def told_of(self, report: ReportRecord, now: datetime) -> None:
        """Remember that a result was told of a report."""
        with self.changing() as session:
            known = session.get(ReportRecord, report.report_key)
            if known is not None:
                known.told_at = now
                session.add(known)

    def was_merged_away(self, patient_id: str, issuer: str = "") -> bool:
        """Whether a merge moved this patient id into another one. Where its authority is not known here by this
        name, one of any authority counts: a result too many held harms nobody."""
        with Session(self._engine) as session:
            return any(record.merged_into for record in self._records(session, patient_id, issuer))

    def is_other_patient(self, order: OrderRecord, patient_id: str) -> bool:
        """Whether an order is for another patient than this one, merges followed; no where either is not stated.
        Authorities are left out: DICOM and HL7 seldom call them the same."""
        if not (order.patient_id and patient_id):
            return False
        return not self.are_same_patient((order.patient_id, ""), (patient_id, ""))

    def names_of(self, patient_id: str, issuer: str) -> list[str]:
        """This patient id and all that merges moved into the same patient, in order."""
        with Session(self._engine) as session:
            records = self._records(session, patient_id, issuer)
            survivors = {(find_survivor(session, record) or record).patient_key for record in records}
            return sorted({patient_id, *(_merged_ids(session, *survivors) if len(survivors) == 1 else ())})

    def are_same_patient(self, one: tuple[str, str], other: tuple[str, str]) -> bool:
        """Whether two patients (id and authority, empty where not stated) are one, merges followed. Both authorities
        are named by one system: where the names differ, they are two unless the site has listed them as one."""
        issuers = self._issuers
        with Session(self._engine) as session:
            if not may_be_same_issuer(one[1], other[1], issuers):
                return same_patient(session, one, other)
            return one[0] == other[0] or _share_survivor(
                session, *(self._records(session, patient_id, issuer) for patient_id, issuer in (one, other))
            )

    def patient(self, patient_id: str, issuer: str) -> PatientRecord | None:
        """What ADT messages told of a patient; None where nothing, or of several authorities and it is not clear which
        of them is meant."""
        with Session(self._engine) as session:
            found = self._records(session, patient_id, issuer) if patient_id else []
            return found[0] if len(found) == 1 else None

    def _records(self, session: Session, patient_id: str, issuer: str) -> list[PatientRecord]:
        """The record of this authority, by any of its names; where there is none, all that may be meant: one that is
        listed as another authority is not."""
        known = session.exec(select(PatientRecord).where(PatientRecord.patient_id == patient_id)).all()
        exact = [record for record in known if are_same_issuer(record.issuer, issuer, self._issuers)]
        return exact or [r for r in known if not are_other_issuers(r.issuer, issuer, self._issuers)]


def _write_upsert(engine: Engine) -> Any:
    """Insert messages, or count a repeat of each that is there; gives back key, position and repeats."""
    insert = postgresql.insert if engine.dialect.name == "postgresql" else sqlite.insert
    table = HeardMessage.__table__  # type: ignore[attr-defined]
    statement = insert(table)
    more = table.c.repeats + statement.excluded.repeats + 1
    return statement.on_conflict_do_update(index_elements=["message_key"], set_={"repeats": more}).returning(
        table.c.message_key, table.c.position, table.c.repeats
    )


def find_patient(session: Session, patient_id: str, issuer: str) -> list[PatientRecord]:
    """The record of a patient id of this authority or, where there is none, all that may be it: an authority that is
    not stated, by the message or so far, excludes none."""
    known = session.exec(select(PatientRecord).where(PatientRecord.patient_id == patient_id)).all()
    exact = [record for record in known if record.issuer == issuer]
    return exact or [record for record in known if not record.issuer or not issuer]


def find_survivor(session: Session, patient: PatientRecord) -> PatientRecord | None:
    """Follow merges from a patient to the end; None where it was never merged away."""
    seen = {patient.patient_key}
    survivor: PatientRecord | None = None
    record: PatientRecord | None = patient
    while record is not None and record.merged_into and record.merged_into not in seen:
        seen.add(record.merged_into)
        survivor = record = session.get(PatientRecord, record.merged_into)
    return survivor


def same_patient(session: Session, one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Whether two patients (id and authority, empty where not stated) are one, merges followed."""
    if one[0] == other[0] and (one[1] == other[1] or not one[1] or not other[1]):
        return True
    return _share_survivor(session, find_patient(session, *one), find_patient(session, *other))


def _merged_ids(session: Session, survivor_key: str) -> set[str]:
    """The patient ids of a survivor and of all that were merged into it, over any number of merges."""
    survivor = session.get(PatientRecord, survivor_key)
    names, seen, last = {survivor.patient_id} if survivor else set(), {survivor_key}, [survivor_key]
    while last:
        merged = session.exec(select(PatientRecord).where(col(PatientRecord.merged_into).in_(last))).all()
        names.update(record.patient_id for record in merged)
        last = [record.patient_key for record in merged if record.patient_key not in seen]
        seen.update(last)
    return names


def _share_survivor(session: Session, one: Sequence[PatientRecord], other: Sequence[PatientRecord]) -> bool:
    """Whether merges have made one patient of both, and of all that either may be."""
    ends = [{(find_survivor(session, record) or record).patient_key for record in records} for records in (one, other)]
    return len(ends[0]) == 1 and ends[0] == ends[1]
