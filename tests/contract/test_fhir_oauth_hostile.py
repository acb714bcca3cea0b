"""The sign-in of the FHIR connector at servers that lie, stall, redirect and break; and at FHIR servers that do not
take what was granted. Nothing here grants a token that is worth anything."""

import asyncio
import json
import ssl
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from connectors.errors import Permanent, Retryable
from connectors.fhir.client import FhirClient
from connectors.fhir.config import FhirConfig
from connectors.fhir.sign_in import SignIn
from tests.fhir_peer import Answer, Json, Peer, closing, peer, said
from tests.signing_keys import entry, make_key, write_pem, write_set

KEY = make_key("ES384")
PATIENT = {"resourceType": "Patient", "id": "1"}
GRANT = {"access_token": "granted-1", "token_type": "bearer", "expires_in": 300, "scope": "system/*.rs"}
TRANSACTION = {
    "resourceType": "Bundle",
    "type": "transaction",
    "entry": [{"resource": {"resourceType": "Device"}, "request": {"method": "POST", "url": "Device"}}],
}


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return write_pem(tmp_path / "key.pem", KEY)


def config_of(server: Peer, key: Path, *, scheme: str = "http", found: bool = False, **oauth: Any) -> FhirConfig:
    base = f"{scheme}://127.0.0.1:{server.server_port}"
    where = {} if found else {"token_url": f"{base}/token"}
    signs = {"client_id": "wetread", "key_files": key, "timeout_s": 5, **where, **oauth}
    return FhirConfig.model_validate({"url": f"{base}/fhir", "oauth": signs})


def answering(token: Answer, fhir: Answer | None = None, metadata: Answer | None = None) -> Callable[[str], Answer]:
    def script(path: str) -> Answer:
        if path.startswith("/token"):
            return token
        if path.endswith("/smart-configuration"):
            return metadata
        return fhir or said(PATIENT)

    return script


def paths(server: Peer) -> list[str]:
    return [path for _, path, _, _ in server.requests]


async def read(config: FhirConfig) -> Json:
    async with closing(FhirClient(config)) as fhir:
        return await fhir.read("Patient/1")


# The token endpoint


@pytest.mark.parametrize(
    "grant",
    [
        {**GRANT, "token_type": "Bearer"},
        {**GRANT, "token_type": "BEARER", "expires_in": "300"},
        {**GRANT, "expires_in": 1e99, "scope": None},
        {**GRANT, "expires_in": 0.5},
        {name: value for name, value in GRANT.items() if name != "expires_in"},
        {name: value for name, value in GRANT.items() if name != "scope"},
    ],
)
async def test_odd_but_usable_grants(grant: Json, key: Path) -> None:
    with peer(answering(said(grant))) as server:
        assert await read(config_of(server, key)) == PATIENT
    assert paths(server) == ["/token", "/fhir/Patient/1"]
    assert server.requests[1][2]["Authorization"] == "Bearer granted-1"


async def test_what_is_asked_is_what_smart_wants(key: Path) -> None:
    with peer(answering(said(GRANT))) as server:
        await read(config_of(server, key, scope="system/Patient.rs system/Device.c"))
    method, _, headers, body = server.requests[0]
    asked = {name: values[0] for name, values in parse_qs(body.decode()).items()}
    assert (method, headers["Content-Type"]) == ("POST", "application/x-www-form-urlencoded")
    assert "Authorization" not in headers
    assert asked.pop("client_assertion").count(".") == 2
    assert asked == {
        "grant_type": "client_credentials",
        "scope": "system/Patient.rs system/Device.c",
        "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
    }


@pytest.mark.parametrize(
    ("answer", "error", "told"),
    [
        (said({**GRANT, "expires_in": 0}), Permanent, "expires_in is no positive number"),
        (said({**GRANT, "expires_in": -1}), Permanent, "expires_in is no positive number"),
        (said({**GRANT, "expires_in": True}), Permanent, "expires_in is no positive number"),
        (said({**GRANT, "expires_in": "soon"}), Permanent, "expires_in is no positive number"),
        (said({**GRANT, "expires_in": [300]}), Permanent, "expires_in is no positive number"),
        ((200, {}, json.dumps({**GRANT, "expires_in": float("nan")}).encode()), Permanent, "expires_in is no positive"),
        (said({**GRANT, "token_type": "mac"}), Permanent, "a type other than bearer"),
        (said({**GRANT, "token_type": None}), Permanent, "a type other than bearer"),
        (said({**GRANT, "access_token": ""}), Permanent, "no usable access_token"),
        (said({**GRANT, "access_token": None}), Permanent, "no usable access_token"),
        (said({**GRANT, "access_token": "a\r\nX-Evil: 1"}), Permanent, "no usable access_token"),
        (said({**GRANT, "access_token": "a b"}), Permanent, "no usable access_token"),
        (said({**GRANT, "access_token": "é"}), Permanent, "no usable access_token"),
        (said({**GRANT, "access_token": "x" * 20_000}), Permanent, "no usable access_token"),
        (said([GRANT]), Permanent, "not JSON of a usable size"),
        ((200, {"Content-Type": "text/html"}, b"<html>Sign in"), Permanent, r"not JSON of a usable size \(text/html\)"),
        ((200, {}, b"[" * 100_000), Permanent, "not JSON of a usable size"),
        ((200, {}, json.dumps(GRANT).encode() + b" " * (1 << 20)), Permanent, "not JSON of a usable size"),
        ((200, {}, b""), Permanent, "not JSON of a usable size"),
        ((302, {"Location": "http://127.0.0.1:1/token"}, b""), Permanent, "redirects elsewhere"),
        ((307, {"Location": "/elsewhere"}, b""), Permanent, "redirects elsewhere"),
        (said({"error": "invalid_client"}, 401), Permanent, r"invalid_client\. Check oauth\.client_id"),
        (
            said({"error": "invalid_grant", "error_description": "bad"}, 400),
            Permanent,
            r"invalid_grant \(bad\)\. Check",
        ),
        (said({"error": "invalid_scope"}, 400), Permanent, r"Correct oauth\.scope"),
        (said({"error": "unauthorized_client"}, 400), Permanent, "Have client_credentials allowed"),
        (said({"error": "never_heard_of"}, 400), Permanent, "Check the client's registration"),
        (said({"error": "temporarily_unavailable"}, 400), Retryable, "cannot be done now"),
        (said({"error": {"a": 1}}, 400), Permanent, r"refused \(HTTP 400\)\. Check oauth\.token_url"),
        (said({"error": "<script>"}, 400), Permanent, r"refused \(HTTP 400\)"),
        ((404, {}, b"<html>"), Permanent, r"refused \(HTTP 404\)"),
        ((401, {}, b""), Permanent, r"refused \(HTTP 401\)"),
        ((429, {"Retry-After": "7"}, b""), Retryable, "HTTP 429"),
        ((503, {"Retry-After": "7"}, b"<html>"), Retryable, "HTTP 503"),
        (said({"error": "server_error"}, 500, **{"Retry-After": "7"}), Retryable, "HTTP 500"),
        (None, Retryable, "no answer"),
        ((200, {"Content-Length": "100"}, b"{"), Retryable, "no answer"),
    ],
)
async def test_a_token_endpoint_that_grants_nothing_usable(
    answer: Answer, error: type[Exception], told: str, key: Path
) -> None:
    """One request each, to the endpoint alone; a transaction that may not be repeated is not even sent, so that its
    failure is never ambiguous."""
    with peer(answering(answer)) as server:
        async with closing(FhirClient(config_of(server, key, timeout_s=1))) as fhir:
            with pytest.raises(error, match=told) as trouble:
                await fhir.transaction(TRANSACTION)
    assert paths(server) == ["/token"]
    if isinstance(trouble.value, Retryable) and answer and "Retry-After" in answer[1]:
        assert trouble.value.retry_after_s == 7
    assertion = parse_qs(server.requests[0][3].decode())["client_assertion"][0]
    assert assertion not in str(trouble.value)
    assert "granted" not in str(trouble.value)


async def test_an_error_that_quotes_our_assertion_is_not_passed_on(key: Path) -> None:
    def script(path: str) -> Answer:
        assertion = parse_qs(server.requests[-1][3].decode())["client_assertion"][0]
        return said({"error": "invalid_client", "error_description": f"cannot read {assertion}"}, 401)

    with peer(script) as server, pytest.raises(Permanent, match="invalid_client") as refused:
        await read(config_of(server, key))
    assert "eyJ" not in str(refused.value)


@pytest.mark.parametrize(
    ("date", "told"),
    [
        ("Wed, 21 Oct 2015 07:28:00 GMT", "This machine's clock is .* s ahead of the server's: set it by NTP"),
        ("Fri, 21 Oct 2199 07:28:00 GMT", "This machine's clock is .* s behind the server's: set it by NTP"),
        ("yesterday", r"\(`wetread keys list`\)\.$"),
        ("", r"\(`wetread keys list`\)\.$"),
    ],
)
async def test_where_clocks_differ_the_refusal_says_so(date: str, told: str, key: Path) -> None:
    with peer(answering(said({"error": "invalid_client"}, 401))) as server:
        handler = server.RequestHandlerClass
        server.RequestHandlerClass = type("Dated", (handler,), {"date_time_string": lambda *_: date})  # type: ignore[misc]
        with pytest.raises(Permanent, match=told):
            await read(config_of(server, key))


async def test_a_slow_token_endpoint_ends_at_the_time_limit_for_all(key: Path) -> None:
    def slow(path: str) -> Answer:
        time.sleep(2)
        return said(GRANT)

    with peer(slow) as server:
        async with closing(FhirClient(config_of(server, key, timeout_s=0.4))) as fhir:
            waiting = (fhir.read("Patient/1") for _ in range(20))
            ends = await asyncio.gather(*waiting, return_exceptions=True)
    assert len(server.requests) == 1
    assert all(isinstance(end, Retryable) and "time limit" in str(end) for end in ends)


async def test_a_trickling_token_endpoint_ends_at_the_time_limit(key: Path) -> None:
    with peer((200, {"Content-Length": "1000"}, b"{")) as server:
        config = config_of(server, key, timeout_s=0.4)
        with pytest.raises(Retryable, match="no answer"):
            await read(config)


async def test_while_a_token_lasts_a_failing_endpoint_interrupts_nothing(key: Path) -> None:
    """In the last seconds of a token it is renewed ahead; where that fails, it is used until it ends, and no longer."""
    now = [0.0]
    answers = [said(GRANT), (503, {}, b""), (503, {}, b"")]
    with peer(lambda path: answers.pop(0)) as server:
        config = config_of(server, key)
        assert config.oauth is not None
        sign_in = SignIn(config, config.oauth, clock=lambda: now[0])
        assert await sign_in.token() == "granted-1"
        now[0] = 269
        assert await sign_in.token() == "granted-1"
        assert len(server.requests) == 1
        now[0] = 280
        assert await sign_in.token() == "granted-1"
        assert len(server.requests) == 2
        now[0] = 300
        with pytest.raises(Retryable, match="HTTP 503"):
            await sign_in.token()
        await sign_in.aclose()


async def test_a_token_is_used_for_an_hour_at_most(key: Path) -> None:
    now = [0.0]
    with peer(answering(said({**GRANT, "expires_in": 10**12}))) as server:
        config = config_of(server, key)
        assert config.oauth is not None
        sign_in = SignIn(config, config.oauth, clock=lambda: now[0])
        for moment, requests in ((0, 1), (3500, 1), (3600, 2)):
            now[0] = moment
            await sign_in.token()
            assert len(server.requests) == requests
        await sign_in.aclose()


async def test_where_every_key_has_ended_nothing_is_sent(tmp_path: Path) -> None:
    file = write_set(tmp_path / "keys.json", entry(KEY, exp=5))
    with peer(answering(said(GRANT))) as server, pytest.raises(Permanent, match=r"no key is in use.*wetread keys new"):
        await read(config_of(server, file))
    assert server.requests == []


# The FHIR server


@pytest.mark.parametrize("grants", ["another token", "the same token"])
async def test_a_server_that_takes_no_token_is_asked_twice(grants: str, key: Path) -> None:
    count = [0]

    def script(path: str) -> Answer:
        if path != "/token":
            return said(None, 401)
        count[0] += 1
        return said({**GRANT, "access_token": f"t-{count[0]}" if grants == "another token" else "t"})

    with peer(script) as server, pytest.raises(Permanent, match=r"granted just now is not accepted either.*token_url"):
        await read(config_of(server, key))
    assert paths(server) == ["/token", "/fhir/Patient/1"] * 2


async def test_a_missing_scope_is_told_with_what_was_granted(key: Path) -> None:
    told = r"scopes granted are 'system/\*\.rs'.*set it in oauth\.scope"
    with peer(answering(said(GRANT), said(None, 403))) as server, pytest.raises(Permanent, match=told):
        await read(config_of(server, key))
    assert paths(server) == ["/token", "/fhir/Patient/1"]


async def test_what_met_401_was_not_acted_on_and_is_sent_again_whole(key: Path) -> None:
    """Even a transaction that may not be repeated: the server said that it did nothing."""
    answers = [said(None, 401), said({"resourceType": "Bundle", "entry": [{"response": {"status": "201"}}]})]
    tokens = [said(GRANT), said({**GRANT, "access_token": "granted-2"})]
    with peer(lambda path: tokens.pop(0) if path == "/token" else answers.pop(0)) as server:
        async with closing(FhirClient(config_of(server, key))) as fhir:
            await fhir.transaction(TRANSACTION)
    sent = [(headers["Authorization"], body) for _, path, headers, body in server.requests if path == "/fhir"]
    assert [who for who, _ in sent] == ["Bearer granted-1", "Bearer granted-2"]
    assert sent[0][1] == sent[1][1] == json.dumps(TRANSACTION).encode()


# What the FHIR server says of its authorization server


@pytest.mark.parametrize(
    ("metadata", "error", "told"),
    [
        (said({}), Permanent, r"names no token_endpoint\. Set oauth\.token_url"),
        (said([]), Permanent, "names no token_endpoint"),
        (said({"token_endpoint": 7}), Permanent, "names no token_endpoint"),
        ((200, {}, b"<html>"), Permanent, "names no token_endpoint"),
        ((200, {}, b" " * (1 << 20)), Permanent, "names no token_endpoint"),
        (said({"token_endpoint": "file:///etc/passwd"}), Permanent, "no URL to sign in at"),
        (said({"token_endpoint": "//127.0.0.1/token"}), Permanent, "no URL to sign in at"),
        (said({"token_endpoint": "http://u:p@127.0.0.1/token"}), Permanent, "no URL to sign in at"),
        (said({"token_endpoint": "http://[::1/token"}), Permanent, "no URL to sign in at"),
        ((404, {}, b""), Permanent, r"HTTP 404\)\. Set oauth\.token_url, or check url"),
        ((302, {"Location": "http://127.0.0.1:1/"}, b""), Permanent, "redirects elsewhere"),
        ((503, {}, b""), Retryable, "HTTP 503"),
        (None, Retryable, "no answer"),
    ],
)
async def test_a_smart_configuration_that_leads_nowhere(
    metadata: Answer, error: type[Exception], told: str, key: Path
) -> None:
    with peer(answering(said(GRANT), metadata=metadata)) as server, pytest.raises(error, match=told):
        await read(config_of(server, key, found=True))
    assert paths(server) == ["/fhir/.well-known/smart-configuration"]


@pytest.mark.parametrize(
    ("lists", "told"),
    [
        ({"token_endpoint_auth_methods_supported": ["client_secret_basic"]}, "does not take private_key_jwt"),
        ({"token_endpoint_auth_signing_alg_values_supported": ["RS384"]}, "does not take ES384"),
    ],
)
async def test_a_server_that_does_not_take_our_way_is_not_asked(lists: Json, told: str, key: Path) -> None:
    metadata = said({"token_endpoint": "http://127.0.0.1:1/token", **lists})
    with peer(answering(said(GRANT), metadata=metadata)) as server, pytest.raises(Permanent, match=told):
        await read(config_of(server, key, found=True))


async def test_a_token_endpoint_that_moves_is_found_again(key: Path) -> None:
    place = ["/token"]

    def script(path: str) -> Answer:
        if path.endswith("/smart-configuration"):
            return said({"token_endpoint": f"http://127.0.0.1:{server.server_port}{place[0]}"})
        if path == place[0]:
            return said({**GRANT, "expires_in": 0.001})
        return said(PATIENT) if path.startswith("/fhir") else (404, {}, b"")

    with peer(script) as server:
        async with closing(FhirClient(config_of(server, key, found=True))) as fhir:
            await fhir.read("Patient/1")
            place[0] = "/moved"
            await asyncio.sleep(0.01)
            with pytest.raises(Permanent, match="HTTP 404"):
                await fhir.read("Patient/1")
            assert await fhir.read("Patient/1") == PATIENT
    assert paths(server).count("/fhir/.well-known/smart-configuration") == 2


async def test_no_sign_in_leaves_https_for_http(key: Path, tmp_path: Path) -> None:
    cert, own = tmp_path / "cert.pem", tmp_path / "own.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(own), "-out", str(cert)]
    await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, own)
    with peer(answering(said(GRANT), metadata=said({"token_endpoint": "http://127.0.0.1:1/token"}))) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        with pytest.raises(Permanent, match="token_endpoint is not https, as the FHIR server is"):
            await read(config_of(server, key, scheme="https", found=True, ca_file=cert))
        with pytest.raises(Permanent, match="not trusted"):
            await read(config_of(server, key, scheme="https"))
    assert paths(server) == ["/fhir/.well-known/smart-configuration"]
