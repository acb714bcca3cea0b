"""Who lives, who takes over, whose turn it is; which errors mean that the store is only away."""

import errno
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import psycopg
import pytest
from sqlalchemy.exc import DBAPIError, IntegrityError, InternalError, OperationalError

from middleware import durable, presence
from middleware.errors import SettingsError
from middleware.presence import be_present
from middleware.settings import Settings, WorkersSettings
from middleware.store.failures import is_out_of_room, is_store_away
from middleware.store.queries import Store, open_engine
from middleware.store.workers import ALIVE, GONE, STOPPED, Sign, Worker, WorkerStore, sign_of
from middleware.taking_over import Watch

NOW = datetime(2026, 3, 4, 10, tzinfo=UTC)


def worker(name: str = "w1", incarnation: str = "a", **changes: object) -> Worker:
    values = {"host": "h", "place": "p", "pid": 7, "born": "1", "version": "2", "started_at": NOW, "last_seen_at": NOW}
    return Worker(executor_id=name, incarnation=incarnation, **{**values, **changes})


@pytest.fixture
def store(tmp_path: Path) -> WorkerStore:
    engine = open_engine(f"sqlite:///{tmp_path}/wetread.sqlite")
    Store(engine)
    return WorkerStore(engine)


def signs(store: WorkerStore) -> dict[str, Sign]:
    return {each.executor_id: sign_of(each) for each in store.workers()}


# One name, one process


def test_a_name_that_is_in_use_is_not_given_twice(store: WorkerStore) -> None:
    assert store.enter(worker()) is None
    other = store.enter(worker(incarnation="b"))
    assert other is not None
    assert other.incarnation == "a"
    assert store.beat("w1", "a", NOW)
    assert not store.beat("w1", "b", NOW)


def test_who_is_known_to_be_dead_is_replaced_but_not_who_gave_a_sign_since(store: WorkerStore) -> None:
    store.enter(worker())
    before = signs(store)["w1"]
    store.beat("w1", "a", NOW)
    assert store.enter(worker(incarnation="b"), silent=before) is not None
    assert store.enter(worker(incarnation="b"), silent=signs(store)["w1"]) is None
    assert not store.beat("w1", "a", NOW), "it finds another one in its place"


def test_who_stopped_gives_the_name_back(store: WorkerStore) -> None:
    store.enter(worker())
    store.leave("w1", "another incarnation", NOW)
    assert signs(store)["w1"].state == ALIVE
    store.leave("w1", "a", NOW)
    assert signs(store)["w1"].state == STOPPED
    assert store.enter(worker(incarnation="b")) is None


def quick(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, executor_id="w1", workers=WorkersSettings(heartbeat_s=0.05, dead_after_s=0.5))


def test_a_living_process_keeps_its_name_and_the_refusal_names_it(tmp_path: Path) -> None:
    with (
        be_present(quick(tmp_path), "2"),
        pytest.raises(SettingsError, match=rf"executor_id w1: process {os.getpid()} on host"),
        be_present(quick(tmp_path), "2"),
    ):
        pytest.fail("two of one name")
    with be_present(quick(tmp_path), "2"):
        assert (tmp_path / "wetread.sqlite").exists()


def test_the_name_of_a_process_that_is_gone_from_this_machine_is_free_at_once(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    store = WorkerStore(open_engine(f"sqlite:///{tmp_path}/wetread.sqlite"))
    mine = presence._describe_myself("w1", "2")
    store.enter(worker(place=mine.place, pid=ended.pid, born="12"))
    long = Settings(data_dir=tmp_path, executor_id="w1", workers=WorkersSettings(dead_after_s=600))
    with be_present(long, "2"):
        assert signs(store)["w1"].state == ALIVE


def test_the_name_of_a_silent_process_of_another_machine_is_free_after_a_while(tmp_path: Path) -> None:
    store = WorkerStore(open_engine(f"sqlite:///{tmp_path}/wetread.sqlite"))
    store.enter(worker(place="another machine"))
    with be_present(quick(tmp_path), "2"):
        assert store.workers()[0].incarnation != "a"


# The dead


def test_silence_counts_only_while_one_could_hear() -> None:
    watch, one = Watch(10.0), worker()
    assert watch.find_silent([one], 0.0) == []
    assert watch.find_silent([one], 4.0) == []
    assert watch.find_silent([one], 9.5) == [], "6 s without a look: nothing was heard of anybody"
    assert watch.find_silent([one], 14.0) == []
    assert watch.find_silent([one], 18.9) == []
    assert watch.find_silent([one], 19.6) == [sign_of(one)]


def test_a_beat_a_stop_and_a_departure() -> None:
    watch = Watch(10.0)
    for at in range(0, 30, 2):
        beating, silent, stopped, gone = worker("b", beats=at), worker("s"), worker("t"), worker("g", state=GONE)
        stopped.state = STOPPED if at > 4 else ALIVE
        found = {sign.executor_id for sign in watch.find_silent([beating, silent, stopped, gone], float(at))}
        assert found == ({"t"} if at > 4 else set()) | ({"s"} if at >= 10 else set())


def test_one_that_gave_a_sign_is_not_taken_over(store: WorkerStore) -> None:
    store.enter(worker())
    seen = signs(store)["w1"]
    store.beat("w1", "a", NOW)
    with store.taking_over(seen) as session:
        assert session is None
    with store.taking_over(signs(store)["w1"]) as session:
        assert session is not None
    assert signs(store)["w1"].state == GONE
    with store.taking_over(replace(signs(store)["w1"], state=ALIVE)) as session:
        assert session is None, "once"
    assert store.beat("w1", "a", NOW), "it only seemed dead, and lives again"
    assert signs(store)["w1"].state == ALIVE


def test_a_takeover_that_fails_leaves_all_to_the_next(store: WorkerStore) -> None:
    store.enter(worker())
    position = store.ask_turn("w1")

    def fail() -> None:
        with store.taking_over(signs(store)["w1"]) as session:
            raise RuntimeError(f"it was ours: {session is not None}")

    with pytest.raises(RuntimeError, match="True"):
        fail()
    assert signs(store)["w1"].state == ALIVE
    assert store.take_turn(position, 1)


# Turns at the model


def test_turns_are_taken_in_order_and_never_more_than_allowed(store: WorkerStore) -> None:
    first, second, third = (store.ask_turn(name) for name in ("w1", "w2", "w3"))
    assert not store.take_turn(third, 2), "two came before"
    assert store.take_turn(first, 2)
    assert store.take_turn(second, 2)
    assert store.take_turn(second, 2) is False, "it has its turn; asking again gives no second one"
    assert not store.take_turn(third, 2)
    store.end_turn(first)
    assert store.take_turn(third, 2)


def test_a_dead_workers_turn_is_free_again(store: WorkerStore) -> None:
    store.enter(worker())
    assert store.take_turn(store.ask_turn("w1"), 1)
    waiting = store.ask_turn("w2")
    assert not store.take_turn(waiting, 1)
    with store.taking_over(signs(store)["w1"]):
        pass
    assert store.take_turn(waiting, 1)
    store.end_turn(waiting)
    assert store.take_turn(store.ask_turn("w1"), 1)
    store.enter(worker(incarnation="b"))
    assert store.take_turn(store.ask_turn("w2"), 1), "its restart frees what it had"


# The store is away


def sqlite_error(make: Callable[[sqlite3.Connection], object]) -> DBAPIError:
    connection = sqlite3.connect(":memory:")
    try:
        make(connection)
    except sqlite3.OperationalError as error:
        return OperationalError("statement", {}, error)
    raise AssertionError


def fill(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA max_page_count = 2")
    connection.execute("CREATE TABLE t (x)")
    connection.execute("INSERT INTO t VALUES (zeroblob(100000))")


def write_read_only(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA query_only = ON")
    connection.execute("CREATE TABLE t (x)")


@pytest.mark.parametrize(
    ("error", "away", "full"),
    [
        (sqlite_error(fill), True, True),
        (sqlite_error(write_read_only), True, True),
        (sqlite_error(lambda c: c.execute("SELECT * FROM no_such_table")), False, False),
        (OperationalError("s", {}, psycopg.errors.AdminShutdown()), True, False),
        (OperationalError("s", {}, psycopg.errors.DiskFull()), True, True),
        (InternalError("s", {}, psycopg.errors.ReadOnlySqlTransaction()), True, True),
        (IntegrityError("s", {}, psycopg.errors.UniqueViolation()), False, False),
        (OSError(errno.ENOSPC, "full"), True, True),
        (OSError(errno.EROFS, "read-only"), True, True),
        (OSError(errno.ENOENT, "not there"), False, False),
        (ValueError("x"), False, False),
    ],
)
def test_what_the_store_says(error: Exception, away: bool, full: bool) -> None:
    assert (is_store_away(error), is_out_of_room(error)) == (away, full)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "FIRST_WAIT_S", 0.001)


@pytest.mark.usefixtures("impatient")
async def test_steps_outlast_the_store_but_no_other_fault() -> None:
    tried: list[str] = []

    async def act(kind: Exception, times: int) -> str:
        tried.append(type(kind).__name__)
        if len(tried) <= times:
            raise kind
        return "done"

    durable.use_patience(None)
    try:
        assert await durable.outlast(lambda: act(OSError(errno.ENOSPC, "full"), 3)) == "done"
        assert len(tried) == 4
        tried.clear()
        with pytest.raises(ValueError, match="x"):
            await durable.outlast(lambda: act(ValueError("x"), 1))
        assert len(tried) == 1
        durable.use_patience(2)
        tried.clear()
        with pytest.raises(OSError, match="full"):
            await durable.outlast(lambda: act(OSError(errno.ENOSPC, "full"), 9))
        assert len(tried) == 2
    finally:
        durable.use_patience(1)
