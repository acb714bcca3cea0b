"""A store in memory that hears messages given as segments, and what it knows afterwards."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from sqlalchemy import create_engine
from sqlalchemy.pool import StaticPool
from sqlmodel import Session, SQLModel, select

from mappings.inputs.er7_to_message import read_message
from middleware.intake.hearing import Hearing, HearingPolicy
from middleware.store.heard import HeardMessage, OrderRecord, PatientRecord, ReportRecord
from middleware.store.hearing import Arrived, HearingStore
from middleware.store.issuers import Issuers

ZONE = ZoneInfo("Europe/Berlin")
START = datetime(2026, 3, 4, 10, 30, tzinfo=UTC)
POLICY = HearingPolicy(frozenset({"P"}), ZONE)


def write_message(kind: str, control_id: str, *segments: str, patient: str = "4711", authority: str = "HOSP") -> bytes:
    """A message with a PID in front of `segments`; none where `patient` is empty."""
    head = f"MSH|^~\\&|RIS|C|WETREAD|AI|20260304103000+0000||{kind}|{control_id}|P|2.5.1"
    pid = (f"PID|1||{patient}^^^{authority}||Canary^Karla||19610203|F",) if patient else ()
    return "\r".join((head, *pid, *segments, "")).encode()


def write_order(
    control_id: str, control: str, numbers: Sequence[str], *, status: str = "", result: str = "", patient: str = "4711"
) -> bytes:
    """An ORM^O01 of one order; `numbers` are placer, filler, accession and study UID, any of them empty."""
    return write_message(
        "ORM^O01", control_id, *order_segments(control, numbers, status=status, result=result), patient=patient
    )


def order_segments(control: str, numbers: Sequence[str], *, status: str = "", result: str = "") -> tuple[str, ...]:
    """ORC, OBR and ZDS of one order."""
    placer, filler, accession, study = numbers
    obr = f"OBR|1|{placer}|{filler}|MRPRO^MRI prostate^L{'|' * 14}{accession}{'|' * 7}{result}"
    return (f"ORC|{control}|{placer}|{filler}||{status}", obr, *((f"ZDS|{study}",) if study else ()))


class Inbox:
    """Messages heard one after the other, a minute apart, each applied at once."""

    def __init__(self, policy: HearingPolicy = POLICY, issuers: Issuers = ()) -> None:
        engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
        self.engine = engine
        self.store = HearingStore(engine, issuers)
        self._at = START
        self._hearing = Hearing(self.store, policy, lambda: self._at)

    def keep(self, *raws: bytes) -> list[int]:
        """Keep messages in one go; their positions."""
        self._at += timedelta(minutes=1)
        return [kept.position for kept in self.store.keep([self._arrived(raw) for raw in raws])]

    def apply(self) -> None:
        """Apply all that was kept."""
        self._hearing.apply_all()

    def hear(self, raw: bytes) -> HeardMessage:
        """The message as it stands once it is applied."""
        (position,) = self.keep(raw)
        self.apply()
        return self.store.message(position)

    def _arrived(self, raw: bytes) -> Arrived:
        header = read_message(raw).header
        return Arrived(
            raw=raw,
            sender="10.0.0.1|RIS|C",
            control_id=header.control_id,
            message_type=header.event,
            state="received",
            notes=[],
            received_at=self._at,
        )

    def _all(self, table: type[SQLModel]) -> list[SQLModel]:
        with Session(self.engine) as session:
            return list(session.exec(select(table)))

    @property
    def orders(self) -> list[OrderRecord]:
        return [o for o in self._all(OrderRecord) if isinstance(o, OrderRecord)]

    @property
    def order(self) -> OrderRecord:
        """The only order."""
        (order,) = self.orders
        return order

    @property
    def patients(self) -> dict[str, PatientRecord]:
        return {p.patient_id: p for p in self._all(PatientRecord) if isinstance(p, PatientRecord)}

    @property
    def reports(self) -> list[ReportRecord]:
        return [r for r in self._all(ReportRecord) if isinstance(r, ReportRecord)]

    @property
    def known(self) -> list[dict[str, object]]:
        """Every order, patient and report, to be compared."""
        return [row.model_dump() for row in (*self.orders, *self.patients.values(), *self.reports)]
