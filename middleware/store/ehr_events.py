"""How far Wetread has read what an EHR changed, and which subscriptions it has there."""

from datetime import datetime

from sqlalchemy import Engine
from sqlmodel import Field, Session, SQLModel, col, select

from middleware.store.tables import time_field


class EhrWatermark(SQLModel, table=True):
    """Up to when, by the EHR's own clock, everything of one `stream` (a search on one server) is in the inbox."""

    __tablename__ = "ehr_watermark"
    stream: str = Field(primary_key=True)
    read_until: datetime = time_field()


class EhrSubscription(SQLModel, table=True):
    """One subscription of ours. `reference` is the server's name of it (`Subscription/12`), `last_event` the number of
    its latest event whose resources are in the inbox."""

    __tablename__ = "ehr_subscription"
    subscription_key: str = Field(primary_key=True)
    reference: str = Field(index=True)
    last_event: int = 0


class EhrEventStore:
    """The tables of this file; each method is one transaction."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        SQLModel.metadata.create_all(engine)

    def ping(self) -> None:
        """Raise unless the database answers."""
        self.subscription("")

    def read_until(self, stream: str) -> datetime | None:
        """The watermark of a stream; None where nothing of it was read yet."""
        with Session(self._engine) as session:
            found = session.get(EhrWatermark, stream)
            return found.read_until if found else None

    def move_watermark(self, stream: str, read_until: datetime) -> None:
        """Move a watermark forward; to an earlier moment it does not move."""
        with Session(self._engine) as session:
            found = session.get(EhrWatermark, stream)
            if found is None:
                session.add(EhrWatermark(stream=stream, read_until=read_until))
            elif read_until > found.read_until:
                found.read_until = read_until
                session.add(found)
            session.commit()

    def remember_subscription(self, key: str, reference: str) -> None:
        """Remember what the server calls a subscription; under another name it counts from 0 again."""
        with Session(self._engine) as session:
            found = session.get(EhrSubscription, key)
            if found is None or found.reference != reference:
                session.merge(EhrSubscription(subscription_key=key, reference=reference, last_event=0))
            session.commit()

    def subscription(self, reference: str) -> EhrSubscription | None:
        """Our subscription of this name at the server; None if it is none of ours."""
        with Session(self._engine, expire_on_commit=False) as session:
            return session.exec(select(EhrSubscription).where(col(EhrSubscription.reference) == reference)).first()

    def set_last_event(self, reference: str, number: int) -> None:
        """Remember the number of the latest event that was read."""
        with Session(self._engine) as session:
            for found in session.exec(select(EhrSubscription).where(col(EhrSubscription.reference) == reference)):
                found.last_event = number
                session.add(found)
            session.commit()
