"""One connection of a sender: finds its messages, hands them over one by one, writes each answer before the next."""

import asyncio
import logging
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum

from connectors.mllp.framing import FrameDecoder, FrameError, encode_frame
from connectors.mllp.listener_config import MllpListenerConfig

PIECE_BYTES = 64 * 1024
_CLOSE_TIMEOUT_S = 1.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Peer:
    """Who is at the other end. `certificate_subject` is set only where TLS verified a client certificate."""

    address: str
    port: int
    certificate_subject: str | None = None

    def __str__(self) -> str:
        return f"{self.address}:{self.port}" + (f" ({self.certificate_subject})" if self.certificate_subject else "")


class ProblemKind(StrEnum):
    """Why the listener ended a connection of its own accord."""

    NOT_ALLOWED = "not_allowed"
    NO_TLS = "no_tls"
    TOO_LARGE = "too_large"
    TOO_SLOW = "too_slow"
    CUT_OFF = "cut_off"
    ANSWER_NOT_TAKEN = "answer_not_taken"
    IDLE = "idle"
    NO_ROOM = "no_room"


@dataclass(frozen=True)
class Problem:
    """What was wrong, as text (`str`) and as a kind. `head` holds the first bytes of the frame concerned, where there
    is one: it may name a patient, so it is left out of `str` and `repr`."""

    kind: ProblemKind
    reason: str
    head: bytes = field(default=b"", repr=False)

    def __str__(self) -> str:
        return self.reason


class Dropped(Exception):
    """The connection has to end, for this problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.reason)
        self.problem = problem


Answers = bytes | tuple[bytes, ...] | None
"""What goes back for one message: nothing, one answer, or (enhanced mode) the accept and the application answer."""

OnMessage = Callable[[bytes, Peer], Awaitable[Answers]]
OnProblem = Callable[[Peer, Problem], Awaitable[bytes | None]]


@dataclass(eq=False)
class Activity:
    """What one connection is doing, for whoever decides which may stay."""

    peer: Peer
    quiet_since: float
    served: bool = False
    busy: bool = False
    leaving: bool = False
    held_bytes: int = 0


class InboundConnection:
    """Serves one peer. `hold(activity, held_bytes)` is told what is held in memory, and may raise Dropped."""

    def __init__(
        self,
        config: MllpListenerConfig,
        activity: Activity,
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        on_message: OnMessage,
        hold: Callable[[Activity, int], None],
    ) -> None:
        self._config = config
        self._activity = activity
        self._reader, self._writer = streams
        self._on_message = on_message
        self._hold = hold
        self._decoder = FrameDecoder(config.max_message_bytes)
        # Not more than a message: then what comes before an oversized frame was always handled already.
        self._piece_bytes = min(PIECE_BYTES, config.max_message_bytes)
        self._frame_since: float | None = None
        self._now = asyncio.get_running_loop().time
        # `drain` then waits until the system has taken the whole answer. Not 0: asyncio's TLS pauses there.
        self._writer.transport.set_write_buffer_limits(high=1)

    async def converse(self) -> Problem | None:
        """Serves the peer until it closes or `leaving` is set; gives the problem where the peer has to be let go."""
        try:
            await self._serve()
        except Dropped as dropped:
            return dropped.problem
        finally:
            # What came of a frame is not kept while the connection closes.
            self._decoder = FrameDecoder(self._config.max_message_bytes)
            self._hold(self._activity, 0)
        return None

    async def write(self, frame: bytes) -> None:
        """Sends a framed answer. Raises Dropped if the peer does not take it in time, or is gone."""
        transport = self._writer.transport
        self._writer.write(frame)
        if not (transport.get_write_buffer_size() or transport.is_closing()):
            return
        try:
            async with asyncio.timeout(self._config.write_timeout_s):
                await self._writer.drain()
        except TimeoutError as error:
            limit = f"write_timeout_s={self._config.write_timeout_s:g}"
            raise self._dropped(ProblemKind.ANSWER_NOT_TAKEN, f"an answer was not taken within {limit}") from error
        except OSError as error:
            reason = "the connection ended before an answer was sent"
            raise self._dropped(ProblemKind.ANSWER_NOT_TAKEN, reason) from error

    async def close(self, *, after_answer: bool = False) -> None:
        """Closes. After an answer, what the peer still sends is read and dropped for a moment: a close with bytes
        unread would reset the connection, and with it the answer on its way."""
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                if after_answer:
                    await self._outlast()
                self._writer.close()
                await self._writer.wait_closed()
        except OSError:
            pass
        finally:
            self.abort()

    def abort(self) -> None:
        """Ends the connection at once."""
        self._writer.transport.abort()

    async def _serve(self) -> None:
        while data := await self._read():
            for message in self._found_in(data):
                if not await self._answered(message) or self._activity.leaving:
                    return
            self._hold(self._activity, self._decoder.pending_bytes)
        if self._decoder.pending_bytes:
            raise self._dropped(ProblemKind.CUT_OFF, "the connection ended inside a frame")

    async def _outlast(self) -> None:
        if self._writer.can_write_eof():
            self._writer.write_eof()
        while await self._reader.read(PIECE_BYTES):
            pass

    async def _read(self) -> bytes:
        """The next bytes, none at the end of the stream. Raises Dropped when the peer takes too long."""
        deadline = self._deadline()
        try:
            async with asyncio.timeout_at(deadline):
                return await self._reader.read(self._piece_bytes)
        except TimeoutError as error:
            raise self._late() from error
        except OSError:
            return b""

    def _deadline(self) -> float:
        """A started frame has to end in time; between frames the peer may be idle for longer. Noise does not count."""
        if not self._decoder.pending_bytes:
            return self._activity.quiet_since + self._config.idle_timeout_s
        if self._frame_since is None:
            self._frame_since = self._now()
        return self._frame_since + self._config.frame_timeout_s

    def _late(self) -> Dropped:
        if self._decoder.pending_bytes:
            limit = f"frame_timeout_s={self._config.frame_timeout_s:g}"
            got = f"{self._decoder.pending_bytes} bytes came"
            return self._dropped(ProblemKind.TOO_SLOW, f"a frame did not end within {limit} ({got})")
        noise = self._decoder.noise_bytes
        told = f" ({noise} bytes outside of frames; does the sender speak MLLP?)" if noise else ""
        limit = f"idle_timeout_s={self._config.idle_timeout_s:g}"
        return self._dropped(ProblemKind.IDLE, f"no message within {limit}{told}")

    def _found_in(self, data: bytes) -> list[bytes]:
        try:
            messages = self._decoder.feed(data)
        except FrameError as error:
            raise self._dropped(ProblemKind.TOO_LARGE, f"{error} (max_message_bytes)") from error
        if messages:
            self._frame_since = None
        self._hold(self._activity, self._decoder.pending_bytes + sum(map(len, messages)))
        return messages

    async def _answered(self, message: bytes) -> bool:
        """Whether the callback took the message; its answer, if any, is then sent."""
        self._activity.busy = True
        try:
            frame = await self._answer_to(message)
            if frame:
                await self.write(frame)
        finally:
            self._activity.busy = False
        self._activity.served = True
        self._activity.quiet_since = self._now()
        return frame is not None

    async def _answer_to(self, message: bytes) -> bytes | None:
        """The framed answer, empty if none is wanted; None if the callback failed, whatever it raised."""
        try:
            answers = await self._on_message(message, self._activity.peer)
            return b"".join(map(encode_frame, (answers,) if isinstance(answers, bytes) else answers or ()))
        except Exception as error:
            self._log_failure(error)
            return None

    def _log_failure(self, error: Exception) -> None:
        """Names the kind of error and where it came from, not its text: that may quote the message."""
        *_, place = traceback.extract_tb(error.__traceback__)
        who, what = f"{self._config.name}: a message from {self._activity.peer}", type(error).__name__
        told = "the connection is closed without an answer"
        _log.error("%s was not handled (%s at %s:%s); %s", who, what, place.filename, place.lineno, told)

    def _dropped(self, kind: ProblemKind, reason: str) -> Dropped:
        return Dropped(Problem(kind, reason, self._decoder.head))
