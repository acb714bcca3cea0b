"""Steps that outlast our own store: away, being restarted, full or read-only, it stops nothing and loses nothing."""

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from dbos import DBOS

from middleware import telemetry
from middleware.store.failures import is_store_away

FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 10.0

P = ParamSpec("P")
Answer = TypeVar("Answer")

_attempts: int | None = 1


def use_patience(attempts: int | None) -> None:
    """From now on try so often; None: for as long as it takes, as the service does. DBOS waits for its own database in
    the same way."""
    global _attempts
    _attempts = attempts


async def outlast(action: Callable[[], Coroutine[Any, Any, Answer]]) -> Answer:
    """Do `action` until our store takes what it does. It is done again as after a crash, so its effects must be
    repeatable."""
    attempt, wait_s = 1, FIRST_WAIT_S
    while True:
        try:
            return await action()
        except Exception as error:
            if not is_store_away(error) or attempt == _attempts:
                raise
            if attempt == 1:
                telemetry.log("waiting for the store", source="store", kind=type(error).__name__)
        await asyncio.sleep(wait_s)
        attempt, wait_s = attempt + 1, min(2 * wait_s, LONGEST_WAIT_S)


def step(function: Callable[P, Coroutine[Any, Any, Answer]]) -> Callable[P, Coroutine[Any, Any, Answer]]:
    """A durable step (DBOS) that outlasts our own store."""

    @functools.wraps(function)
    async def outlasting(*args: P.args, **kwargs: P.kwargs) -> Answer:
        return await outlast(functools.partial(function, *args, **kwargs))

    return DBOS.step()(outlasting)
