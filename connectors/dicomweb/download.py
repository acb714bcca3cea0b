"""One GET whose answer is read in large pieces, by the standard library's blocking HTTP client.

httpx spends as long on copying a study as the network takes (64 KiB a read, three copies each); here a read
takes what the socket holds, up to 256 KiB. tests/bench/bench_fetch.py measures it. To be used in a thread.
"""

import http.client
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import urlsplit

from connectors.dicomweb.config import DicomwebConfig
from connectors.dicomweb.http import sign_in, tls_context, untrusted
from connectors.errors import Retryable

PIECE_BYTES = 256 * 1024


class Download:
    """The answer to one GET below the server's url: its status and headers, then its body in pieces."""

    def __init__(self, config: DicomwebConfig, path: str, headers: Mapping[str, str], where: str) -> None:
        self._config = config
        self._where = where
        parts = urlsplit(config.url)
        self._connection = _connection(config, parts.scheme, parts.hostname or "", parts.port)
        self._connect()
        sent = {"Accept-Encoding": "identity", **sign_in(config), **headers}
        with self._broken_connections():
            self._connection.request("GET", f"{parts.path}{path}", headers=sent)
            self._answer = self._connection.getresponse()

    @property
    def status(self) -> int:
        return self._answer.status

    @property
    def headers(self) -> http.client.HTTPMessage:
        return self._answer.headers

    def pieces(self) -> Iterator[bytes]:
        """The body as it arrives, at most 256 KiB a time. Raises Retryable where the connection breaks."""
        while piece := self._read():
            yield piece

    def close(self) -> None:
        self._connection.close()

    def _read(self) -> bytes:
        with self._broken_connections():
            return self._answer.read1(PIECE_BYTES)

    def _connect(self) -> None:
        limit_s = self._config.connect_timeout_s
        try:
            self._connection.connect()
        except TimeoutError as error:
            raise Retryable(f"{self._where}: no connection within connect_timeout_s={limit_s:g}.") from error
        except ssl.SSLCertVerificationError as error:
            raise untrusted(error, self._where) from error
        except OSError as error:
            raise Retryable(f"{self._where}: no connection ({error}). Check that the server runs and url.") from error
        self._connection.sock.settimeout(self._config.read_timeout_s)

    @contextmanager
    def _broken_connections(self) -> Iterator[None]:
        limit_s = self._config.read_timeout_s
        try:
            yield
        except TimeoutError as error:
            raise Retryable(f"{self._where}: the server fell silent for read_timeout_s={limit_s:g}.") from error
        except (OSError, http.client.HTTPException) as error:
            raise Retryable(f"{self._where}: the connection broke ({type(error).__name__}).") from error


def _connection(config: DicomwebConfig, scheme: str, host: str, port: int | None) -> http.client.HTTPConnection:
    limit_s = config.connect_timeout_s
    if scheme == "https":
        return http.client.HTTPSConnection(host, port, timeout=limit_s, context=tls_context(config))
    return http.client.HTTPConnection(host, port, timeout=limit_s)
