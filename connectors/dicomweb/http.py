"""HTTP for DICOMweb: opens clients from the settings, and turns answers and failures into connector errors."""

import logging
import ssl
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Protocol

import httpx

from connectors.dicomweb.config import DicomwebConfig
from connectors.errors import ConnectorError, NotThere, Permanent, Retryable

# httpx prints every URL at INFO, and a QIDO query holds patient names and ids.
logging.getLogger("httpx").setLevel(logging.WARNING)

_RETRYABLE_STATUS = (408, 425, 429)
_GONE = (404, 410)


class _Headers(Protocol):
    """Headers by name, whatever the case; httpx and http.client both give such."""

    def get(self, name: str, failobj: str, /) -> str: ...


def tls_context(config: DicomwebConfig) -> ssl.SSLContext:
    """TLS as the settings ask: the server's CA, and our certificate where there is one."""
    try:
        context = ssl.create_default_context(cafile=config.ca_file)
        if config.client_cert_file:
            # An empty password makes an encrypted key fail here, where none would ask at the terminal.
            context.load_cert_chain(config.client_cert_file, config.client_key_file, "")
    except OSError as error:
        raise Permanent(
            f"{config.name}: ca_file, client_cert_file or client_key_file cannot be used ({type(error).__name__})."
        ) from error
    return context


def sign_in(config: DicomwebConfig) -> dict[str, str]:
    """The Authorization header that the settings ask for, or none."""
    if config.token:
        return {"Authorization": f"Bearer {config.token.get_secret_value()}"}
    if config.user and config.password:
        pair = f"{config.user}:{config.password.get_secret_value()}".encode()
        return {"Authorization": f"Basic {b64encode(pair).decode()}"}
    return {}


def open_client(config: DicomwebConfig) -> httpx.AsyncClient:
    """A client that uses no proxy of the environment and follows no redirect."""
    # Orthanc and others drop an idle connection after one second; reusing it just then would fail.
    limits = httpx.Limits(max_connections=8, keepalive_expiry=0.5)
    headers = {"Accept-Encoding": "identity", **sign_in(config)}
    return httpx.AsyncClient(verify=tls_context(config), headers=headers, limits=limits, trust_env=False)


def timeouts(config: DicomwebConfig, *, read_s: float | None = None) -> httpx.Timeout:
    """Connect, read and write limits of one request."""
    silence_s = read_s or config.read_timeout_s
    return httpx.Timeout(silence_s, connect=config.connect_timeout_s, pool=config.connect_timeout_s)


def retry_after_s(headers: _Headers) -> float | None:
    """Seconds the server asks to wait (RFC 9110 10.2.3: a number, or an HTTP date), None if it does not say."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (aware - datetime.now(UTC)).total_seconds())


def status_error(status: int, headers: _Headers, where: str, missing: str) -> ConnectorError | None:
    """The error that an HTTP status stands for, None for 2xx. `missing` is what a 404 means here."""
    if 200 <= status < 300:
        return None
    if status in (401, 403):
        return Permanent(
            f"{where}: not allowed (HTTP {status}). Check token, or user and password, and the rights of this user."
        )
    if status == 404:
        return Permanent(f"{where}: {missing} (HTTP 404).")
    if status in _RETRYABLE_STATUS or status >= 500:
        return Retryable(
            f"{where}: the server cannot answer now (HTTP {status}).", retry_after_s=retry_after_s(headers)
        )
    if 300 <= status < 400:
        return Permanent(f"{where}: redirects elsewhere (HTTP {status}). Set url to the final address.")
    return Permanent(f"{where}: refused the request (HTTP {status}). Check url and what this server supports.")


def not_there(status: int, where: str, missing: str) -> NotThere | None:
    """The error for a status that says: no such object (any more). Only where url itself was seen to be right."""
    return NotThere(f"{where}: {missing} (HTTP {status}).") if status in _GONE else None


@contextmanager
def http_failures(where: str, config: DicomwebConfig) -> Iterator[None]:
    """Turns failures of the connection into Retryable, and those that the settings cause into Permanent."""
    try:
        yield
    except httpx.ConnectTimeout as error:
        raise Retryable(f"{where}: no connection within connect_timeout_s={config.connect_timeout_s:g}.") from error
    except httpx.TimeoutException as error:
        raise Retryable(f"{where}: the server fell silent for longer than its time limit.") from error
    except TimeoutError as error:
        raise Retryable(f"{where}: the answer took longer than its time limit.") from error
    except httpx.ConnectError as error:
        raise _connect_error(error, where) from error
    except (httpx.UnsupportedProtocol, httpx.InvalidURL, httpx.LocalProtocolError) as error:
        raise Permanent(f"{where}: the request cannot be sent. Check url and token.") from error
    except httpx.TransportError as error:
        raise Retryable(f"{where}: the connection broke ({type(error).__name__}).") from error


def _connect_error(error: httpx.ConnectError, where: str) -> ConnectorError:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return untrusted(cause, where)
        cause = cause.__cause__ or cause.__context__
    return Retryable(f"{where}: no connection ({error}). Check that the server runs and url is right.")


def untrusted(error: ssl.SSLCertVerificationError, where: str) -> Permanent:
    """The error for a server certificate that the settings do not trust."""
    return Permanent(f"{where}: its certificate is not trusted ({error.verify_message}). Check ca_file and url.")
