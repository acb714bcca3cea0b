"""An MLLP receiver as asyncio calls: one message at a time, and an answer only if it is the answer to it.

Original and enhanced acknowledgement mode of HL7 v2.5.1 chapter 2.9. Nothing is resent here.
"""

import asyncio
import logging
from dataclasses import dataclass

from connectors.errors import Ambiguous, Permanent
from connectors.mllp.acknowledgement import (
    ACCEPTED,
    FAILED,
    Acknowledgement,
    Refused,
    control_id_of,
    parse_acknowledgement,
)
from connectors.mllp.config import MllpConfig
from connectors.mllp.connection import Connection, connect, tls_context
from connectors.mllp.framing import FrameError, encode_frame

_log = logging.getLogger(__name__)


@dataclass
class _Wait:
    """What came while waiting for one answer, to be told if none does."""

    control_id: str
    other_answers: int = 0
    unreadable: int = 0
    committed: bool = False

    def story(self, noise_bytes: int) -> str:
        told = [
            "a commit (CA) but no application answer came" if self.committed else "",
            f"{self.other_answers} answers to other control ids came" if self.other_answers else "",
            f"{self.unreadable} messages without a readable MSA came" if self.unreadable else "",
            f"{noise_bytes} bytes outside of whole frames came" if noise_bytes else "",
        ]
        return "; ".join(part for part in told if part) or "nothing came"


class MllpClient:
    """Talks to one receiver over one lasting connection. Close it with `aclose`."""

    def __init__(self, config: MllpConfig) -> None:
        self._config = config
        self._tls = tls_context(config)
        self._connection: Connection | None = None
        self._one_at_a_time = asyncio.Lock()

    async def send(self, message: bytes, control_id: str) -> Acknowledgement:
        """Sends one message, and gives the acceptance (AA, or CA in enhanced mode) of exactly this message.

        `control_id` is its MSH-10; an answer counts only if its MSA-2 is the same.
        Raises Retryable before any byte was sent, Refused (Permanent) for AE, AR, CE, CR, and Ambiguous for
        everything else after sending; the connection is then closed.
        """
        frame = self._frame(message, control_id)
        async with self._one_at_a_time:
            connection = await self._live_connection()
            try:
                answer = await self._ask(connection, frame, control_id)
            except BaseException:
                # Cancelled or ambiguous: a late answer must not meet the next message.
                self._drop()
                raise
        return self._judged(answer)

    async def probe(self) -> str:
        """Says that the receiver takes connections; sends nothing."""
        if not self._one_at_a_time.locked():
            async with self._one_at_a_time:
                await self._live_connection()
        kind = "TLS" if self._config.tls else "TCP"
        return f"{self._config.name}: {self._config.host}:{self._config.port} is connected ({kind})"

    async def aclose(self) -> None:
        """Closes the connection."""
        self._drop()

    def _frame(self, message: bytes, control_id: str) -> bytes:
        where = f"{self._config.name}: message {control_id!r}"
        if not control_id or control_id_of(message) != control_id.encode():
            raise Permanent(f"{where} does not carry that control id in MSH-10.")
        try:
            return encode_frame(message)
        except FrameError as error:
            raise Permanent(f"{where} cannot be sent: {error}.") from error

    async def _live_connection(self) -> Connection:
        """The connection, opened anew if the receiver closed it meanwhile."""
        if self._connection and not await self._connection.is_alive():
            self._drop()
        if self._connection is None:
            self._connection = await connect(self._config, self._tls)
        return self._connection

    async def _ask(self, connection: Connection, frame: bytes, control_id: str) -> Acknowledgement:
        wait = _Wait(control_id)
        try:
            async with asyncio.timeout(self._config.ack_timeout_s):
                await connection.send(frame)
                return await self._answer(connection, wait)
        except TimeoutError as error:
            raise self._unanswered(f"within ack_timeout_s={self._config.ack_timeout_s:g}", wait, connection) from error
        except (OSError, FrameError) as error:
            reason = str(error) if isinstance(error, FrameError) else "the connection ended"
            raise self._unanswered(f"because of {reason}", wait, connection) from error

    async def _answer(self, connection: Connection, wait: _Wait) -> Acknowledgement:
        """The answer to this message; everything else that comes is counted and passed over."""
        while True:
            answer = parse_acknowledgement(await connection.receive(), self._config.encoding)
            if answer is None:
                wait.unreadable += 1
            elif answer.control_id != wait.control_id:
                wait.other_answers += 1
                _log.warning("%s: an answer to another control id was passed over", self._config.name)
            elif answer.code == "CA" and self._config.wait_for_application_ack:
                wait.committed = True
            else:
                return answer

    def _judged(self, answer: Acknowledgement) -> Acknowledgement:
        if answer.code in ACCEPTED:
            return answer
        verdict = "reported an error" if answer.code in FAILED else "rejected it"
        said = f": {answer.text}" if answer.text else ", without a reason"
        raise Refused(
            f"{self._config.name}: message {answer.control_id!r}: the receiver {verdict} ({answer.code}){said}. "
            "Correct the message or the receiver, then send it again.",
            answer,
        )

    def _unanswered(self, why: str, wait: _Wait, connection: Connection) -> Ambiguous:
        return Ambiguous(
            f"{self._config.name}: message {wait.control_id!r} was sent but not answered {why} "
            f"({wait.story(connection.noise_bytes)}). Look at the receiver before sending it again."
        )

    def _drop(self) -> None:
        if self._connection:
            self._connection.close()
            self._connection = None
