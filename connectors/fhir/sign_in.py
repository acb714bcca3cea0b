"""Signs in at the authorization server of a FHIR server: client_credentials with private_key_jwt.

Source: SMART App Launch 2.2, "Backend Services" and "Client Authentication: Asymmetric"; RFC 6749 4.4 and 5; RFC 7523.
"""

import asyncio
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import NoReturn
from urllib.parse import urlsplit

import httpx
from authlib.oauth2.rfc7523 import private_key_jwt_sign

from connectors.errors import Permanent, Retryable
from connectors.fhir.config import FhirConfig, OAuthConfig
from connectors.fhir.keys import KeyRing, SigningKey
from connectors.fhir.outcome import retry_after_s
from connectors.fhir.wire import Answer, exchange, failures, tls_context

_ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
# SMART allows 300 s. Less leaves room for a clock of ours that is ahead of the server's.
_ASSERTION_LIFETIME_S = 120
_MAX_ANSWER_BYTES = 1 << 18
# A token is used for so long at most, whatever the server says, and given back so long before it ends.
_LONGEST_USE_S = 3600.0
_SPARE_S = 30.0
# SMART makes expires_in a must. Where it is missing, 401 tells when the token has ended.
_UNSTATED_LIFETIME_S = 60.0
_SKEW_S = 30.0
_TOKEN = re.compile(r"[\x21-\x7e]{1,16384}")
_ERROR_CODE = re.compile(r"[a-z_]{1,40}")
_RETRYABLE_STATUS = (408, 425, 429)
_NEXT_STEPS = {
    "invalid_client": "Check oauth.client_id, and that the server knows the public keys (`wetread keys list`)",
    "invalid_grant": "Check oauth.client_id, and that the server knows the public keys (`wetread keys list`)",
    "invalid_scope": "Correct oauth.scope to what the server grants this client",
    "unauthorized_client": "Have client_credentials allowed for this client",
    "unsupported_grant_type": "Check oauth.token_url; this endpoint does not know client_credentials",
}


@dataclass(frozen=True)
class Grant:
    """An access token, what it allows, and when to renew and to stop using it (monotonic seconds)."""

    value: str = field(repr=False)
    scope: str
    renew_at: float
    ends_at: float


class SignIn:
    """Holds the access token of one FHIR server and renews it before it ends. Close it with `aclose`.

    However many requests need a new token, one request fetches it; all of them get it, or its failure.
    """

    def __init__(self, server: FhirConfig, oauth: OAuthConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._server = server
        self._oauth = oauth
        self._clock = clock
        self._keys = KeyRing(oauth.key_files)
        self._found_url = ""
        self._grant: Grant | None = None
        self._renewing: asyncio.Task[Grant] | None = None
        self._http = httpx.AsyncClient(
            verify=tls_context(f"{server.name}.oauth", oauth.ca_file or server.ca_file),
            headers={"Accept": "application/json"},
            timeout=httpx.Timeout(oauth.timeout_s, connect=server.connect_timeout_s),
            trust_env=False,
        )

    async def token(self, rejected: str = "") -> str:
        """An access token that is not `rejected`, from memory or by a new sign-in.

        Raises Permanent where the server refuses us, Retryable where it cannot be asked now and no token is left.
        """
        held = self._grant if self._grant and self._grant.value != rejected else None
        if held and self._clock() < held.renew_at:
            return held.value
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renew())
            self._renewing.add_done_callback(_look_at)
        try:
            # One caller's time limit must not end the sign-in that the others wait for.
            return (await asyncio.shield(self._renewing)).value
        except Retryable:
            if held and self._clock() < held.ends_at:
                return held.value
            raise

    def advice(self, status: int) -> str:
        """What to do where the FHIR server does not take a token that was just granted."""
        granted = f"'{self._grant.scope[:500]}'" if self._grant and self._grant.scope else "not stated"
        if status == 403:
            return f"The scopes granted are {granted}. Have the missing one granted, and set it in oauth.scope."
        return (
            f"A token that {self._host()} granted just now is not accepted either. "
            "Check that oauth.token_url belongs to this server."
        )

    async def aclose(self) -> None:
        """Ends a sign-in that goes on, and closes all connections."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)
        await self._http.aclose()

    async def _renew(self) -> Grant:
        try:
            async with asyncio.timeout(self._oauth.timeout_s):
                self._grant = await self._ask(self._oauth.token_url or await self._discover())
        except TimeoutError as error:
            raise Retryable(f"{self._where()}: no answer (time limit).") from error
        except (Permanent, Retryable):
            # The server may have moved its token endpoint.
            self._found_url = ""
            raise
        return self._grant

    def _host(self) -> str:
        return urlsplit(self._oauth.token_url or self._found_url or self._server.url).netloc

    def _where(self) -> str:
        return f"{self._server.name}: sign-in at {self._host()}"

    async def _discover(self) -> str:
        """The token endpoint that the FHIR server names (SMART App Launch 2.2, "Conformance")."""
        if not self._found_url:
            where = f"{self._server.name}: smart-configuration"
            request = self._http.build_request("GET", f"{self._server.url}/.well-known/smart-configuration")
            with failures(where):
                answer = await exchange(self._http, request, _MAX_ANSWER_BYTES)
            if not answer.is_success:
                _refuse_status(answer, where, "Set oauth.token_url, or check url.")
            self._found_url = self._check_metadata(answer.json(), where)
        return self._found_url

    def _check_metadata(self, metadata: object, where: str) -> str:
        url = metadata.get("token_endpoint") if isinstance(metadata, dict) else None
        if not isinstance(metadata, dict) or not isinstance(url, str):
            raise Permanent(f"{where}: names no token_endpoint. Set oauth.token_url.")
        _check_endpoint(url, self._server.url, where)
        methods = metadata.get("token_endpoint_auth_methods_supported")
        if isinstance(methods, list) and "private_key_jwt" not in methods:
            raise Permanent(f"{where}: the server does not take private_key_jwt. Have it enabled, or use token.")
        algorithms = metadata.get("token_endpoint_auth_signing_alg_values_supported")
        used = self._signing_key().algorithm
        if isinstance(algorithms, list) and used not in algorithms:
            raise Permanent(f"{where}: the server does not take {used}. Put a key of the other kind into key_files.")
        return url

    def _signing_key(self) -> SigningKey:
        try:
            return self._keys.signing_key()
        except ValueError as error:
            raise Permanent(f"{self._server.name}: oauth.key_files: {error}") from None

    async def _ask(self, url: str) -> Grant:
        sent_at, assertion = self._clock(), self._assertion(url)
        form = {
            "grant_type": "client_credentials",
            "scope": self._oauth.scope,
            "client_assertion_type": _ASSERTION_TYPE,
            "client_assertion": assertion,
        }
        with failures(self._where()):
            answer = await exchange(self._http, self._http.build_request("POST", url, data=form), _MAX_ANSWER_BYTES)
        if not answer.is_success:
            self._refuse(answer, assertion)
        return _read_grant(answer, sent_at, self._where())

    def _assertion(self, url: str) -> str:
        """A JWT that says who we are, for this endpoint alone and for a short while; its `jti` is drawn anew."""
        key = self._signing_key()
        return str(
            private_key_jwt_sign(
                key.key,
                self._oauth.client_id,
                url,
                alg=key.algorithm,
                header={"kid": key.kid},
                expires_in=_ASSERTION_LIFETIME_S,
            )
        )

    def _refuse(self, answer: Answer, assertion: str) -> NoReturn:
        """Raise what an error answer of the token endpoint stands for (RFC 6749 5.2)."""
        said = answer.json()
        said = said if isinstance(said, dict) else {}
        code = str(said.get("error", ""))
        if not _ERROR_CODE.fullmatch(code):
            _refuse_status(answer, self._where(), "Check oauth.token_url.")
        if answer.status in _RETRYABLE_STATUS or answer.status >= 500 or code == "temporarily_unavailable":
            raise _later(answer, self._where())
        words = "".join(c for c in str(said.get("error_description", "")) if c.isprintable())[:300]
        words = "" if not words or assertion[:40] in words else f" ({words})"
        step = _NEXT_STEPS.get(code, "Check the client's registration at the server")
        raise Permanent(f"{self._where()}: refused with {code}{words}. {step}.{_told_skew(answer)}")


def _look_at(task: asyncio.Task[Grant]) -> None:
    """Every waiter may be gone by now; then nobody else asks for the failure, and asyncio would print it."""
    if not task.cancelled():
        task.exception()


def _check_endpoint(url: str, base: str, where: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.username
    except ValueError:
        usable = False
    if not usable:
        raise Permanent(f"{where}: its token_endpoint is no URL to sign in at. Set oauth.token_url.")
    if base.startswith("https:") and parts.scheme != "https":
        raise Permanent(f"{where}: its token_endpoint is not https, as the FHIR server is. Have that corrected.")


def _refuse_status(answer: Answer, where: str, step: str) -> NoReturn:
    status = answer.status
    if status in _RETRYABLE_STATUS or (status >= 500 and status != 501):
        raise _later(answer, where)
    if 300 <= status < 400:
        raise Permanent(f"{where}: redirects elsewhere (HTTP {status}). Set oauth.token_url to the final address.")
    raise Permanent(f"{where}: refused (HTTP {status}). {step}")


def _later(answer: Answer, where: str) -> Retryable:
    wait_s = retry_after_s(answer.headers)
    return Retryable(f"{where}: cannot be done now (HTTP {answer.status}).", retry_after_s=wait_s)


def _told_skew(answer: Answer) -> str:
    """That our clocks differ, where they do: then no assertion of ours is valid there."""
    try:
        theirs = parsedate_to_datetime(answer.headers.get("date", ""))
        ahead_s = (datetime.now(UTC) - theirs).total_seconds()
    except (ValueError, TypeError):
        return ""
    if abs(ahead_s) < _SKEW_S:
        return ""
    side = "ahead of" if ahead_s > 0 else "behind"
    return f" This machine's clock is {abs(ahead_s):.0f} s {side} the server's: set it by NTP."


def _read_grant(answer: Answer, sent_at: float, where: str) -> Grant:
    """The token of a successful answer. Raises Permanent for one that cannot be used."""
    said = answer.json() if answer.is_whole else None
    if not isinstance(said, dict):
        raise Permanent(f"{where}: the answer is not JSON of a usable size ({answer.kind}). Check oauth.token_url.")
    value, kind, scope = said.get("access_token"), said.get("token_type"), said.get("scope", "")
    if not isinstance(value, str) or not _TOKEN.fullmatch(value):
        raise Permanent(f"{where}: the answer holds no usable access_token. Check oauth.token_url.")
    if not isinstance(kind, str) or kind.lower() != "bearer":
        raise Permanent(f"{where}: the token is of a type other than bearer, which a FHIR server does not take.")
    lifetime_s = _lifetime_s(said.get("expires_in"), where)
    spare_s = min(_SPARE_S, lifetime_s / 4)
    scope = "".join(c for c in scope if c.isprintable()) if isinstance(scope, str) else ""
    return Grant(value, scope, sent_at + lifetime_s - spare_s, sent_at + lifetime_s)


def _lifetime_s(stated: object, where: str) -> float:
    if stated is None:
        return _UNSTATED_LIFETIME_S
    try:
        lifetime_s = math.nan if isinstance(stated, bool) else float(stated)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        lifetime_s = math.nan
    if math.isnan(lifetime_s) or lifetime_s <= 0:
        raise Permanent(f"{where}: the token's expires_in is no positive number of seconds; no token can be used.")
    return min(lifetime_s, _LONGEST_USE_S)
