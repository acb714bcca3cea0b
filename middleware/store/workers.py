"""Which processes work on this database: each says that it lives, and the living take over from the dead.

Whether a process lives is judged by its `beats`, which grow while it does, and by the watcher's own clock: the clocks
of two machines need not agree.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Engine, text
from sqlmodel import Field, Session, SQLModel, col, delete, select

from middleware.store.queries import changing
from middleware.store.tables import time_field

ALIVE, STOPPED, GONE = "alive", "stopped", "gone"


class Worker(SQLModel, table=True):
    """One process that runs workflows, by its executor id. `incarnation` differs at each start; `place` and `born`
    tell the process from every other on its machine. `state` is alive, stopped (in order, its unfinished work is
    anybody's) or gone (another process has taken over what it left)."""

    __tablename__ = "worker"
    executor_id: str = Field(primary_key=True)
    incarnation: str
    host: str
    place: str
    pid: int
    born: str
    version: str
    state: str = Field(default=ALIVE, index=True)
    beats: int = 0
    started_at: datetime = time_field()
    last_seen_at: datetime = time_field()


class InferenceTurn(SQLModel, table=True):
    """One wish to ask the model, first come first served; `is_served` from when it may until it is done."""

    __tablename__ = "inference_turn"
    position: int | None = Field(default=None, primary_key=True)
    executor_id: str = Field(index=True)
    is_served: bool = False


@dataclass(frozen=True)
class Sign:
    """What shows that a worker lived when it was looked at: another one later means that it still does."""

    executor_id: str
    incarnation: str
    beats: int
    state: str


def sign_of(worker: Worker) -> Sign:
    """The worker's sign of life at this moment."""
    return Sign(worker.executor_id, worker.incarnation, worker.beats, worker.state)


@contextmanager
def alone(engine: Engine, *, wait: bool) -> Iterator[Session | None]:
    """One transaction during which no other process enters, takes over or restarts work; None where another one is at
    it and `wait` is false. The database ends it with the connection, so that a process that dies blocks nobody."""
    with changing(engine) as session:
        if engine.dialect.name != "postgresql":  # `changing` holds SQLite's only write lock already
            yield session
            return
        function = "pg_advisory_xact_lock" if wait else "pg_try_advisory_xact_lock"
        taken = session.connection().execute(text(f"SELECT {function}(hashtext('wetread workers'))")).scalar()
        yield session if wait or taken else None


class WorkerStore:
    """The tables above. Every method is one transaction."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        SQLModel.metadata.create_all(engine)

    def workers(self) -> list[Worker]:
        """All that were ever here and are not forgotten, by name."""
        with Session(self._engine, expire_on_commit=False) as session:
            return list(session.exec(select(Worker).order_by(col(Worker.executor_id))))

    def enter(self, mine: Worker, *, silent: Sign | None = None) -> Worker | None:
        """Be the process of this executor id; the other one that is, where there is one. `silent` is the sign of one
        that is known to be dead, in whose place we come."""
        with alone(self._engine, wait=True) as session:
            assert session is not None
            other = session.get(Worker, mine.executor_id)
            if other is not None and other.state == ALIVE and sign_of(other) != silent:
                return other
            _give_turns_back(session, mine.executor_id)
            session.merge(mine)
            return None

    def beat(self, executor_id: str, incarnation: str, now: datetime) -> bool:
        """Say that we live; False where another process has come in our place."""
        with changing(self._engine) as session:
            mine = session.get(Worker, executor_id, with_for_update=True)
            if mine is None or mine.incarnation != incarnation:
                return False
            mine.state, mine.beats, mine.last_seen_at = ALIVE, mine.beats + 1, now
            return True

    def leave(self, executor_id: str, incarnation: str, now: datetime) -> None:
        """Say that we stopped in order."""
        with changing(self._engine) as session:
            mine = session.get(Worker, executor_id, with_for_update=True)
            if mine is not None and mine.incarnation == incarnation:
                mine.state, mine.last_seen_at = STOPPED, now

    @contextmanager
    def taking_over(self, seen: Sign) -> Iterator[Session | None]:
        """The transaction in which the work of this worker is ours to take on; None where it gave another sign of life
        since, or another process is at it. Done once the block ends; nothing is where it fails. Whatever the block
        writes here must go through that session: SQLite has one writer."""
        with alone(self._engine, wait=False) as session:
            worker = session.get(Worker, seen.executor_id, with_for_update=True) if session else None
            if session is None or worker is None or sign_of(worker) != seen:
                yield None
                return
            _give_turns_back(session, seen.executor_id)
            yield session
            worker.state = GONE

    @contextmanager
    def restarting(self) -> Iterator[bool]:
        """Whether nobody else takes over or restarts work while the block runs."""
        with alone(self._engine, wait=False) as session:
            yield session is not None

    # Turns at the model

    def ask_turn(self, executor_id: str) -> int:
        """Stand in the queue for the model; our position."""
        with changing(self._engine) as session:
            turn = InferenceTurn(executor_id=executor_id)
            session.add(turn)
            session.flush()
            assert turn.position is not None
            return turn.position

    def take_turn(self, position: int, limit: int) -> bool:
        """Whether we may ask now: fewer than `limit` do, and nobody else waits who came before."""
        with changing(self._engine) as session:
            if self._engine.dialect.name == "postgresql":  # or two would count at once, and both find room
                session.connection().execute(text("LOCK TABLE inference_turn IN EXCLUSIVE MODE"))
            turns = session.exec(select(InferenceTurn).order_by(col(InferenceTurn.position))).all()
            room = limit - sum(1 for turn in turns if turn.is_served)
            ahead = [turn for turn in turns if not turn.is_served][: max(room, 0)]
            mine = next((turn for turn in ahead if turn.position == position), None)
            if mine is not None:
                mine.is_served = True
            return mine is not None

    def end_turn(self, position: int) -> None:
        """Make room for the next."""
        with changing(self._engine) as session:
            session.exec(delete(InferenceTurn).where(col(InferenceTurn.position) == position))


def _give_turns_back(session: Session, executor_id: str) -> None:
    session.exec(delete(InferenceTurn).where(col(InferenceTurn.executor_id) == executor_id))
