"""One TCP or TLS connection to an MLLP receiver: writes frames, gives back the messages that come."""

import asyncio
import ssl
from collections import deque

from connectors.errors import Permanent, Retryable
from connectors.mllp.config import MllpConfig
from connectors.mllp.framing import FrameDecoder, FrameError

_PIECE_BYTES = 64 * 1024
# Turns of the event loop in which news that the socket already holds (a close, TLS records) reach the reader.
_SETTLING_TURNS = 5


class Connection:
    """An open connection. `receive` gives one message a call."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, max_ack_bytes: int) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = FrameDecoder(max_ack_bytes)
        self._waiting: deque[bytes] = deque()

    @property
    def noise_bytes(self) -> int:
        """Bytes that came outside of whole frames."""
        return self._decoder.noise_bytes + self._decoder.pending_bytes

    async def is_alive(self) -> bool:
        """Whether the peer has not closed it; looked at without sending. What came unasked is dropped."""
        for _ in range(_SETTLING_TURNS):
            await asyncio.sleep(0)
        try:
            while True:
                async with asyncio.timeout(0):
                    data = await self._reader.read(_PIECE_BYTES)
                if not data:
                    return False
                self._decoder.feed(data)
        except TimeoutError:
            self._waiting.clear()
            return not self._writer.is_closing()
        except (OSError, FrameError):
            return False

    async def send(self, frame: bytes) -> None:
        self._writer.write(frame)
        await self._writer.drain()

    async def receive(self) -> bytes:
        """The next message. Raises ConnectionResetError once the peer has closed, FrameError if it is too large."""
        while not self._waiting:
            data = await self._reader.read(_PIECE_BYTES)
            if not data:
                raise ConnectionResetError("closed by the receiver")
            self._waiting.extend(self._decoder.feed(data))
        return self._waiting.popleft()

    def close(self) -> None:
        """Drops the connection at once."""
        self._writer.transport.abort()


def tls_context(config: MllpConfig) -> ssl.SSLContext | None:
    """TLS as the settings ask, None for plain TCP. The certificate is checked against `host`."""
    if not config.tls:
        return None
    try:
        context = ssl.create_default_context(cafile=config.ca_file)
        if config.client_cert_file:
            # An empty password makes an encrypted key fail here, where none would ask at the terminal.
            secret = config.client_key_password.get_secret_value() if config.client_key_password else ""
            context.load_cert_chain(config.client_cert_file, config.client_key_file, secret)
    except OSError as error:
        raise Permanent(
            f"{config.name}: ca_file, client_cert_file or client_key_file cannot be used ({type(error).__name__})."
        ) from error
    return context


async def connect(config: MllpConfig, context: ssl.SSLContext | None) -> Connection:
    """Opens a connection, or raises Retryable: nothing was sent."""
    where = f"{config.name}: {config.host}:{config.port}"
    try:
        async with asyncio.timeout(config.connect_timeout_s):
            reader, writer = await asyncio.open_connection(config.host, config.port, ssl=context)
    except TimeoutError as error:
        raise Retryable(f"{where}: no connection within connect_timeout_s={config.connect_timeout_s:g}.") from error
    except ssl.SSLCertVerificationError as error:
        reason = error.verify_message
        raise Permanent(f"{where}: its certificate is not trusted ({reason}). Check ca_file and host.") from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise Retryable(f"{where}: no connection ({reason}). Check that the receiver runs, host and port.") from error
    return Connection(reader, writer, config.max_ack_bytes)
