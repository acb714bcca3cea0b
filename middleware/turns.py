"""Turns at the model: over all processes no more questions at one time than a site allows, first come first served."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from dbos import DBOS

from middleware.durable import outlast
from middleware.store.workers import WorkerStore

LOOK_EVERY_S = 0.1


@asynccontextmanager
async def take_turn(workers: WorkerStore, limit: int | None) -> AsyncIterator[None]:
    """Wait for our turn, which lasts while the block runs; None: no limit, nobody waits. A process that dies loses its
    turns when its name is used again or others take over from it. `wetread process`, where a person waits, does not
    stand in the queue."""
    executor_id = DBOS.executor_id
    if limit is None or all(worker.executor_id != executor_id for worker in await asyncio.to_thread(workers.workers)):
        yield
        return
    position = await asyncio.to_thread(workers.ask_turn, executor_id)
    try:
        while not await asyncio.to_thread(workers.take_turn, position, limit):  # noqa: ASYNC110 - asked in the store
            await asyncio.sleep(LOOK_EVERY_S)
        yield
    finally:
        await outlast(lambda: asyncio.to_thread(workers.end_turn, position))
