"""The sign-in of the FHIR connector against oidc-provider, in front of a FHIR server that takes its tokens only."""

import asyncio
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from connectors.errors import Permanent, Retryable
from connectors.fhir.client import FhirClient
from connectors.fhir.config import FhirConfig
from connectors.fhir.keys import KeyRing, add_key
from deploy.hospital.ehr import start_fallback
from deploy.hospital.process import free_port
from tests.authorization import SCOPES, RunningAuthorization, start_authorization
from tests.fhir_peer import Json, closing, peer
from tests.signing_keys import entry, make_key, write_pem, write_set

KEYS = {kind: make_key(kind) for kind in ("ES384", "RS384")}
SCOPE = " ".join(SCOPES)
AT_ONCE = 50


def client_of(name: str, kind: str) -> Json:
    public = {**KEYS[kind].as_dict(private=False), "kid": KEYS[kind].thumbprint(), "alg": kind, "use": "sig"}
    return {"client_id": name, "scope": SCOPE, "jwks": {"keys": [public]}}


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with start_fallback(tmp_path_factory.mktemp("ehr")) as server:
        yield server.url


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, upstream: str) -> Iterator[RunningAuthorization]:
    clients = [client_of(kind, kind) for kind in KEYS]
    clients.append({**client_of("reader", "ES384"), "scope": "system/*.rs"})
    with start_authorization(tmp_path_factory.mktemp("sign-in"), upstream, clients) as server:
        yield server


@pytest.fixture
def server(shared: RunningAuthorization) -> Iterator[RunningAuthorization]:
    yield shared
    shared.control(revoke=True, ttl_s=300, delay_s=0)


def config_of(server: RunningAuthorization, key: Path, **oauth: Any) -> FhirConfig:
    signs = {"client_id": "ES384", "key_files": [key], "scope": SCOPE, **oauth}
    return FhirConfig.model_validate({"url": server.fhir_url, "oauth": signs})


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return write_pem(tmp_path / "key.pem", KEYS["ES384"])


def report(number: int) -> Json:
    """A transaction that stores one report once."""
    code = {"text": "test"}
    identifier = {"system": "urn:test:oauth", "value": str(number)}
    resource = {"resourceType": "DiagnosticReport", "identifier": [identifier], "status": "preliminary", "code": code}
    request = {"method": "PUT", "url": f"DiagnosticReport?identifier=urn:test:oauth|{number}"}
    return {"resourceType": "Bundle", "type": "transaction", "entry": [{"resource": resource, "request": request}]}


def requests_since(server: RunningAuthorization, before: Json) -> int:
    return int(server.seen()["token_requests"] - before["token_requests"])


@pytest.mark.parametrize("kind", ["ES384", "RS384"])
@pytest.mark.parametrize("is_found", [True, False])
async def test_signs_in_and_works(kind: str, is_found: bool, server: RunningAuthorization, tmp_path: Path) -> None:
    """Both algorithms, with the token endpoint found and given; the server judges the assertion as SMART wants it."""
    before = server.seen()
    file = write_pem(tmp_path / "key.pem", KEYS[kind])
    config = config_of(server, file, client_id=kind, token_url="" if is_found else server.token_url)
    async with closing(FhirClient(config)) as fhir:
        assert "FHIR 4" in await fhir.probe()
        await fhir.transaction(report(1))
        assert len(await fhir.search("DiagnosticReport", {"identifier": "urn:test:oauth|1"})) == 1
    after = server.seen()
    assert requests_since(server, before) == 1
    assert after["refused"] == before["refused"]
    assert after["granted"][-1] == SCOPE
    told = after["assertions"][-1]
    assert told["header"] == {"alg": kind, "typ": "JWT", "kid": KEYS[kind].thumbprint()}
    assert (told["claims"]["iss"], told["claims"]["sub"], told["claims"]["aud"]) == (kind, kind, server.token_url)
    assert 0 < told["claims"]["exp"] - told["claims"]["iat"] <= 300


async def test_a_token_that_ends_in_the_middle_of_work_is_renewed_once(server: RunningAuthorization, key: Path) -> None:
    before = server.seen()
    async with closing(FhirClient(config_of(server, key))) as fhir:
        await fhir.transaction(report(2))
        server.control(revoke=True)
        await fhir.transaction(report(2))
        await fhir.transaction(report(2))
        server.control(revoke=True)
        assert len(await fhir.search("DiagnosticReport", {"identifier": "urn:test:oauth|2"})) == 1
    assert requests_since(server, before) == 3
    names = [told["claims"]["jti"] for told in server.seen()["assertions"]]
    assert len(set(names)) == len(names)


async def test_a_token_is_renewed_before_it_ends(server: RunningAuthorization, key: Path) -> None:
    """Tokens of two seconds over five seconds of work: the FHIR server sees none that has ended."""
    server.control(ttl_s=2)
    before = server.seen()
    async with closing(FhirClient(config_of(server, key))) as fhir:
        until = time.monotonic() + 5
        while time.monotonic() < until:
            await fhir.probe()
            await asyncio.sleep(0.05)
    assert 2 <= requests_since(server, before) <= 5
    assert server.seen()["refused"] == before["refused"]


@pytest.mark.parametrize("had_one", [True, False])
async def test_many_requests_without_a_valid_token_sign_in_once(
    had_one: bool, server: RunningAuthorization, key: Path
) -> None:
    async with closing(FhirClient(config_of(server, key))) as fhir:
        if had_one:
            await fhir.probe()
            server.control(revoke=True)
        server.control(delay_s=0.3)
        before = server.seen()
        answers = await asyncio.gather(*(fhir.transaction(report(number)) for number in range(AT_ONCE)))
    assert len(answers) == AT_ONCE
    assert requests_since(server, before) == 1


async def test_one_who_gives_up_does_not_end_the_sign_in_of_the_others(server: RunningAuthorization, key: Path) -> None:
    server.control(delay_s=0.5)
    before = server.seen()
    async with closing(FhirClient(config_of(server, key))) as fhir:
        impatient = asyncio.create_task(fhir.probe())
        patient = [asyncio.create_task(fhir.probe()) for _ in range(3)]
        await asyncio.sleep(0.1)
        impatient.cancel()
        assert len(await asyncio.gather(*patient)) == 3
        with pytest.raises(asyncio.CancelledError):
            await impatient
    assert requests_since(server, before) == 1


async def test_closing_in_the_middle_of_a_sign_in_leaves_nothing_behind(
    server: RunningAuthorization, key: Path
) -> None:
    server.control(delay_s=1)
    fhir = FhirClient(config_of(server, key))
    waiting = asyncio.create_task(fhir.probe())
    await asyncio.sleep(0.2)
    waiting.cancel()
    await fhir.aclose()
    await asyncio.sleep(0)
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task() and not task.done()]
    assert [task for task in left if task is not waiting] == []


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"client_id": "nobody"}, r"refused with invalid_client.*Check oauth\.client_id"),
        ({"client_id": "RS384"}, r"refused with invalid_client.*knows the public keys"),
        ({"client_id": "reader"}, r"refused with invalid_scope.*Correct oauth\.scope"),
    ],
)
async def test_a_refused_sign_in_says_what_to_do_and_shows_no_secret(
    changed: Json, told: str, server: RunningAuthorization, key: Path
) -> None:
    async with closing(FhirClient(config_of(server, key, **changed))) as fhir:
        with pytest.raises(Permanent, match=told) as refused:
            await fhir.transaction(report(3))
    assert "eyJ" not in f"{refused.value!r} {refused.value.__cause__!r}"


async def test_neither_token_nor_assertion_nor_key_is_shown(
    server: RunningAuthorization, key: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("DEBUG")
    config = config_of(server, key)
    async with closing(FhirClient(config)) as fhir:
        await fhir.probe()
        sign_in = fhir._sign_in
        assert sign_in is not None
        token = await sign_in.token()
        shown = f"{config!r} {config.model_dump_json()} {sign_in._grant!r} {fhir!r}"
    secret = KEYS["ES384"].as_dict(private=True)["d"]
    assert isinstance(secret, str)
    printed = "".join(capsys.readouterr())
    for text in (shown, printed, "\n".join(record.getMessage() for record in caplog.records)):
        assert token not in text
        assert secret not in text
        assert "eyJ" not in text


@pytest.mark.parametrize(("ahead_s", "works"), [(-100, True), (-10, True), (10, True), (150, True), (900, False)])
async def test_clocks_that_differ(
    ahead_s: float, works: bool, server: RunningAuthorization, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An assertion lives for two of the five minutes allowed, so that clocks may differ by minutes either way."""
    skewed = SimpleNamespace(time=lambda: time.time() + ahead_s)
    monkeypatch.setattr("authlib.oauth2.rfc7523.assertion.time", skewed)
    async with closing(FhirClient(config_of(server, key))) as fhir:
        if works:
            await fhir.probe()
            return
        with pytest.raises(Permanent, match="invalid_client"):
            await fhir.probe()
    assert "five minutes" in server.seen()["refused"][-1]


async def test_an_authorization_server_that_is_down_and_comes_back(upstream: str, key: Path, tmp_path: Path) -> None:
    port, clients = free_port(), [client_of("ES384", "ES384")]
    with start_authorization(tmp_path, upstream, clients, port=port) as server:
        fhir = FhirClient(config_of(server, key, token_url=server.token_url))
        await fhir.transaction(report(4))
    async with closing(fhir):
        with pytest.raises(Retryable, match="no connection"):
            await fhir.transaction(report(4))
        with start_authorization(tmp_path, upstream, clients, port=port) as server:
            await fhir.transaction(report(4))
            assert server.seen()["token_requests"] == 1


# Rotation


def move(file: Path, document: Json, by_s: float) -> None:
    """As if `by_s` seconds had passed since the keys were made."""
    earlier = [
        {**each, **{name: each[name] - by_s for name in ("nbf", "exp") if name in each}} for each in document["keys"]
    ]
    write_set(file, *earlier)
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1_000_000))


@contextmanager
def publishing(ring: KeyRing) -> Iterator[str]:
    """Serves the public keys as our API does."""
    headers = {"Content-Type": "application/json", "Cache-Control": "max-age=0"}
    with peer(lambda path: (200, headers, json.dumps(ring.published()).encode())) as server:
        yield f"http://127.0.0.1:{server.server_port}/.well-known/jwks.json"


async def test_keys_change_while_work_goes_on(upstream: str, tmp_path: Path) -> None:
    """A new key of the other kind is published, then signs, then the old one goes; no sign-in is refused. The server
    fetched our keys after the new one was published and before it signed, and does not ask again for a minute."""
    file = write_set(tmp_path / "keys.json", entry(KEYS["RS384"], "old"))
    with publishing(KeyRing([file])) as jwks_uri:
        client = {"client_id": "turning", "scope": SCOPE, "jwks_uri": jwks_uri}
        with start_authorization(tmp_path, upstream, [client]) as server:
            async with closing(FhirClient(config_of(server, file, client_id="turning"))) as fhir:
                document = add_key(json.loads(file.read_text()), "ES384", time.time(), 3600)
                for passed_s in (0, 1800, 3601, 7000, 7201):
                    move(file, document, passed_s)
                    server.control(revoke=True)
                    await fhir.transaction(report(5))
            seen = server.seen()
    new = document["keys"][0]["kid"]
    assert [told["header"]["kid"] for told in seen["assertions"]] == ["old", "old", new, new, new]
    assert seen["refused"] == []
    assert [each["kid"] for each in KeyRing([file]).published()["keys"]] == [new]
