"""GET of JSON from Orthanc's REST API; what goes wrong becomes a connector error. Nothing is retried."""

import asyncio
import json
import logging
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from connectors.errors import ConnectorError, NotThere, Permanent, Retryable
from connectors.orthanc.config import OrthancConfig

# httpx prints every URL at INFO.
logging.getLogger("httpx").setLevel(logging.WARNING)

_RETRYABLE_STATUS = (408, 425, 429)


class OrthancHttp:
    """Reads from one Orthanc. Uses no proxy of the environment and follows no redirect. Close it with `aclose`."""

    def __init__(self, config: OrthancConfig) -> None:
        self._config = config
        self._http = httpx.AsyncClient(
            verify=_tls_context(config),
            auth=(config.user, config.password.get_secret_value()) if config.user and config.password else None,
            timeout=httpx.Timeout(config.read_timeout_s, connect=config.connect_timeout_s),
            # Orthanc drops an idle connection after one second; reusing it just then would fail.
            limits=httpx.Limits(max_connections=4, keepalive_expiry=0.5),
            trust_env=False,
        )

    async def get(self, path: str, where: str) -> object:
        """The JSON at this path below the root. Raises NotThere for 404, Retryable, Permanent."""
        request = self._http.build_request("GET", f"{self._config.url}{path}", headers={"Accept": "application/json"})
        with _failures(where):
            async with asyncio.timeout(self._config.request_timeout_s):
                answer, body = await self._receive(request, where)
        if error := _status_error(answer, where):
            raise error
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Permanent(f"{where}: the answer is not JSON. Check that url is Orthanc's REST root.") from error

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def _receive(self, request: httpx.Request, where: str) -> tuple[httpx.Response, bytes]:
        answer = await self._http.send(request, stream=True)
        body = bytearray()
        try:
            async for chunk in answer.aiter_bytes():
                body += chunk
                if len(body) > self._config.max_answer_bytes:
                    raise Permanent(f"{where}: the answer is larger than max_answer_bytes. Ask for fewer changes.")
        finally:
            await answer.aclose()
        return answer, bytes(body)


def _tls_context(config: OrthancConfig) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=config.ca_file)
    except OSError as error:
        raise Permanent(f"{config.name}: ca_file cannot be used ({type(error).__name__}).") from error


def _status_error(answer: httpx.Response, where: str) -> ConnectorError | None:
    status = answer.status_code
    if 200 <= status < 300:
        return None
    if status in (401, 403):
        return Permanent(f"{where}: not allowed (HTTP {status}). Check user and password, and RemoteAccessAllowed.")
    if status == 404:
        return NotThere(f"{where}: the server does not have it, or not any more (HTTP 404).")
    if status in _RETRYABLE_STATUS or status >= 500:
        wished = answer.headers.get("retry-after", "")
        wait_s = float(wished) if wished.isascii() and wished.isdigit() else None
        return Retryable(f"{where}: the server cannot answer now (HTTP {status}).", retry_after_s=wait_s)
    if 300 <= status < 400:
        return Permanent(f"{where}: redirects elsewhere (HTTP {status}). Set url to the final address.")
    return Permanent(f"{where}: refused the request (HTTP {status}). Check url.")


@contextmanager
def _failures(where: str) -> Iterator[None]:
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise _connect_error(error, where) from error
    except (httpx.TimeoutException, TimeoutError) as error:
        raise Retryable(f"{where}: no whole answer within the time limit.") from error
    except (httpx.UnsupportedProtocol, httpx.InvalidURL, httpx.LocalProtocolError) as error:
        raise Permanent(f"{where}: the request cannot be sent. Check url.") from error
    except httpx.DecodingError as error:
        raise Permanent(f"{where}: the answer's compression is broken.") from error
    except httpx.TransportError as error:
        raise Retryable(f"{where}: the connection broke ({type(error).__name__}).") from error


def _connect_error(error: Exception, where: str) -> ConnectorError:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            said = cause.verify_message
            return Permanent(f"{where}: its certificate is not trusted ({said}). Check ca_file and url.")
        cause = cause.__cause__ or cause.__context__
    return Retryable(f"{where}: no connection ({error or 'time limit'}). Check that the server runs and url is right.")
