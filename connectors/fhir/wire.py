"""What a FHIR server and its authorization server share on the wire: TLS, bounded answers, failures by consequence."""

import json
import logging
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from connectors.errors import Ambiguous, ConnectorError, Permanent, Retryable

# httpx prints every URL at INFO, and a FHIR query holds patient names and ids.
logging.getLogger("httpx").setLevel(logging.WARNING)


@dataclass(frozen=True)
class Answer:
    """An HTTP answer with its body, of which no more than the limit was taken."""

    status: int
    headers: httpx.Headers
    content: bytes
    is_whole: bool

    @property
    def is_success(self) -> bool:
        """Whether the status is 2xx."""
        return 200 <= self.status < 300

    @property
    def kind(self) -> str:
        """The media type, for messages."""
        return str(self.headers.get("content-type", "no Content-Type")).partition(";")[0][:80]

    def json(self) -> object:
        """The JSON in it, None if it is not JSON."""
        try:
            return json.loads(self.content)
        except (ValueError, RecursionError):
            return None


async def exchange(http: httpx.AsyncClient, request: httpx.Request, max_bytes: int) -> Answer:
    """Sends a request and takes at most `max_bytes` of the answer, cut where it is longer."""
    answer = await http.send(request, stream=True)
    content = bytearray()
    try:
        async for chunk in answer.aiter_bytes():
            content += chunk
            if len(content) > max_bytes:
                break
    finally:
        await answer.aclose()
    return Answer(answer.status_code, answer.headers, bytes(content[:max_bytes]), len(content) <= max_bytes)


def tls_context(name: str, ca_file: Path | None) -> ssl.SSLContext:
    """Trusts the CAs of `ca_file`, or the system's. Raises Permanent for a file that holds none."""
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise Permanent(f"{name}: ca_file cannot be used ({type(error).__name__}).") from error


def unanswered(where: str, what: str) -> Ambiguous:
    """It was sent, and what came back does not say what became of it."""
    return Ambiguous(f"{where}: sent, but no answer of the server ({what}). Look there before sending it again.")


@contextmanager
def failures(where: str, *, repeatable: bool = True) -> Iterator[None]:
    """Turns failures of the connection into Retryable, or Ambiguous where something unrepeatable was sent."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
        raise _connect_error(error, where) from error
    except (httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:
        raise Permanent(f"{where}: the request cannot be sent. Check url and token.") from error
    except httpx.DecodingError as error:
        raise Permanent(f"{where}: the answer's compression is broken.") from error
    except (httpx.TransportError, TimeoutError) as error:
        what = "time limit" if isinstance(error, httpx.TimeoutException | TimeoutError) else type(error).__name__
        if not repeatable:
            raise unanswered(where, what) from error
        raise Retryable(f"{where}: no answer ({what}).") from error


def _connect_error(error: Exception, where: str) -> ConnectorError:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return Permanent(
                f"{where}: its certificate is not trusted ({cause.verify_message}). Check ca_file and url."
            )
        cause = cause.__cause__ or cause.__context__
    return Retryable(f"{where}: no connection ({error or 'time limit'}). Check that the server runs and url is right.")
