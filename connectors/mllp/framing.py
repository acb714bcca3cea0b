"""MLLP frames: puts a message into one, and finds them in a byte stream however it is cut up. Pure.

Source: HL7 v2 Transport Specification MLLP, release 1: <VT> message <FS><CR>; VT and FS never occur inside.
"""

START = b"\x0b"
END = b"\x1c\x0d"
_HEAD_BYTES = 4096


class FrameError(ValueError):
    """Bytes that no MLLP frame can carry, or a frame larger than allowed."""


def encode_frame(message: bytes) -> bytes:
    """The frame around one message. Raises FrameError if the message holds VT or FS."""
    if START in message or END[:1] in message:
        raise FrameError("the message holds a byte that MLLP reserves (0x0B or 0x1C)")
    return START + message + END


class FrameDecoder:
    """Finds frames in a stream: feed it bytes as they come, it gives the messages that became whole.

    Bytes outside of frames are dropped and counted in `noise_bytes`; so is a frame that a new start byte
    cuts off. A frame of more than `max_bytes` raises FrameError, after which the stream is of no more use.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()
        self._searched = 0
        self._inside = False
        self.noise_bytes = 0

    @property
    def pending_bytes(self) -> int:
        """Bytes of a frame that has started and not ended."""
        return len(self._buffer) if self._inside else 0

    @property
    def head(self) -> bytes:
        """The first bytes of the frame that has not ended, or was too large: enough for its MSH."""
        return bytes(self._buffer[:_HEAD_BYTES])

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that these bytes complete, oldest first."""
        self._buffer += data
        messages = []
        while (message := self._next()) is not None:
            messages.append(message)
        return messages

    def _next(self) -> bytes | None:
        if not self._inside and not self._enter():
            return None
        end = self._buffer.find(END, self._searched)
        if (end if end >= 0 else len(self._buffer)) > self._max_bytes:
            raise FrameError(f"a frame of more than {self._max_bytes} bytes")
        if end < 0:
            # The last byte may be the first half of the end.
            self._searched = max(0, len(self._buffer) - 1)
            return None
        return self._leave(end)

    def _enter(self) -> bool:
        start = self._buffer.find(START)
        dropped = len(self._buffer) if start < 0 else start
        self.noise_bytes += dropped
        del self._buffer[: dropped + (start >= 0)]
        self._inside, self._searched = start >= 0, 0
        return self._inside

    def _leave(self, end: int) -> bytes:
        content = bytes(self._buffer[:end])
        del self._buffer[: end + len(END)]
        self._inside, self._searched = False, 0
        cut_off, _, message = content.rpartition(START)
        self.noise_bytes += len(cut_off)
        return message
