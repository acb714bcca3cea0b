"""The running service behind a real authorization server that fetches our public keys from the service itself; and
what is kept of an EHR's refusal. The EHR is the in-memory FHIR server behind a proxy."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import Response

from deploy.hospital.chart import chart_bundle
from deploy.hospital.ehr import start_fallback
from deploy.hospital.process import free_port
from tests.authorization import SCOPES, RunningAuthorization, start_authorization
from tests.commands import Ended, run_wetread
from tests.crash.small_study import SmallStudy
from tests.proxy import Proxy, open_proxy
from tests.serving import Service

SCOPE = " ".join(SCOPES)
STUDIES = ("works", "killed", "refused", "warned")
WORDS = "Doe^Jane 1970-01-01 is not ours"


@dataclass
class Site:
    """The service, the authorization server that it signs in at, the proxy before the EHR, and the studies' UIDs."""

    service: Service
    server: RunningAuthorization
    proxy: Proxy
    keys: Path
    studies: dict[str, str]

    def run(self, *arguments: object) -> Ended:
        """A command beside the service, on its settings."""
        config = str(self.service.folder / "wetread.yaml")
        return run_wetread(self.service.folder / "beside", *arguments, WETREAD_CONFIG=config)

    def deliver(self, name: str) -> dict[str, Any]:
        """The delivery of a study's bundle to the EHR once it has settled."""
        ended = self.service.wait_until_settled(self.studies[name], 120)
        assert ended["state"] == "released", ended["reasons"]
        (delivery,) = [each for each in ended["deliveries"] if each["destination"] == "ehr"]
        return dict(delivery)

    def answers(self, delivery: dict[str, Any]) -> Any:
        """What the API shows of the EHR's words."""
        return self.service.http.get(f"/deliveries/{delivery['delivery_id']}/answers").json()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, small_study: SmallStudy, small_triton: str) -> Iterator[Site]:
    folder, port = tmp_path_factory.mktemp("sign-in"), free_port()
    copies = {name: small_study.copy(f"sign-in-{name}") for name in STUDIES}
    for name, copy in copies.items():
        (folder / "pacs" / name).mkdir(parents=True)
        for number, instance in enumerate(copy.instances):
            (folder / "pacs" / name / f"{number}.dcm").write_bytes(instance)
    keys = folder / "keys.json"
    made = run_wetread(folder / "keys", "keys", "new", keys)
    assert made.code == 0, made.said
    settings = {
        "pacs": {"folder": str(folder / "pacs")},
        "triton": {"url": small_triton},
        "retry": {"attempts": 6, "first_wait_s": 0.1, "longest_wait_s": 1.0},
        "ehr": {
            "url": f"http://127.0.0.1:{port}/fhir",
            "oauth": {"client_id": "wetread", "key_files": [str(keys)], "scope": SCOPE},
        },
    }
    service = Service(folder / "service", settings)
    client = {"client_id": "wetread", "scope": SCOPE, "jwks_uri": f"{service.api}/.well-known/jwks.json"}
    with start_fallback(folder) as ehr, open_proxy(ehr.url.removesuffix("/fhir")) as proxy:
        for copy in copies.values():
            chart = chart_bundle(copy.spec)
            httpx.post(ehr.url, json=chart, trust_env=False, timeout=30).raise_for_status()
        with start_authorization(folder, f"{proxy.url}/fhir", [client], port=port) as server:
            service.start()
            yield Site(service, server, proxy, keys, {name: copy.study_uid for name, copy in copies.items()})
            assert service.stop() == 0
    log = service.log()
    assert "Traceback" not in log
    assert "eyJ" not in log
    assert WORDS not in log


@pytest.fixture(autouse=True)
def _as_it_was(site: Site) -> Iterator[None]:
    yield
    site.proxy.judge = lambda method, path, body: None
    site.server.control(delay_s=0, revoke=True)


def reports(site: Site, name: str) -> int:
    """How many DiagnosticReports the EHR has of a study."""
    stored = httpx.get(f"{site.proxy.url}/fhir/DiagnosticReport?_count=100", trust_env=False, timeout=30).json()
    return sum(site.studies[name] in json.dumps(entry) for entry in stored.get("entry", []))


def test_a_reading_signs_in_with_the_key_that_the_service_publishes(site: Site) -> None:
    site.service.announce(site.studies["works"])
    delivery = site.deliver("works")
    assert delivery["state"] == "delivered", delivery["reason"]
    assert reports(site, "works") == 1
    assert site.answers(delivery) == []
    seen = site.server.seen()
    assert seen["refused"] == []
    answer = site.service.http.get("/.well-known/jwks.json")
    (published,) = answer.json()["keys"]
    assert published["kid"] == seen["assertions"][0]["header"]["kid"]
    assert set(published) == {"kty", "crv", "x", "y", "kid", "alg", "use", "key_ops"}
    assert answer.headers["cache-control"] == "public, max-age=300"
    assert "✓ ehr" in site.run("check").said


def test_killed_in_the_middle_of_a_sign_in_it_delivers_once(site: Site) -> None:
    """Killed while it signs in for the context, and again while it signs in anew in the middle of the delivery."""
    before = site.server.control(revoke=True, delay_s=3)["token_requests"]
    site.service.kill()
    site.service.start()
    site.service.announce(site.studies["killed"])
    wait_until(lambda: site.server.seen()["token_requests"] > before, site)
    site.service.kill()
    site.server.control(delay_s=0)
    asked: list[int] = []

    def lapse(method: str, path: str, body: bytes) -> Response | None:
        if method != "POST" or asked:
            return None
        asked.append(site.server.control(delay_s=3)["token_requests"])
        return Response("", 401)

    site.proxy.judge = lapse
    site.service.start()
    wait_until(lambda: bool(asked) and site.server.seen()["token_requests"] > asked[0], site)
    site.service.kill()
    site.server.control(delay_s=0)
    site.service.start()
    delivery = site.deliver("killed")
    assert (delivery["state"], delivery["attempts"]) == ("delivered", 2), delivery["reason"]
    assert reports(site, "killed") == 1


def wait_until(happened: Callable[[], bool], site: Site) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline, site.service.log()[-3000:]
        time.sleep(0.02)


def outcome(severity: str) -> dict[str, Any]:
    issue = {"severity": severity, "code": "business-rule", "diagnostics": WORDS, "expression": ["Bundle.entry[0]"]}
    return {"resourceType": "OperationOutcome", "issue": [issue]}


def test_of_a_refusal_the_words_are_kept_with_the_delivery_and_not_told_elsewhere(site: Site) -> None:
    said = json.dumps(outcome("error"))

    def refuse(method: str, path: str, body: bytes) -> Response | None:
        return Response(said, 422, {"Content-Type": "application/fhir+json"}) if method == "POST" else None

    site.proxy.judge = refuse
    site.service.announce(site.studies["refused"])
    delivery = site.deliver("refused")
    assert (delivery["state"], delivery["attempts"]) == ("dead", 1)
    assert "HTTP 422). The server says: error business-rule at Bundle.entry[0]." in delivery["reason"]
    assert WORDS not in json.dumps(delivery)
    (kept,) = site.answers(delivery)
    assert (kept["attempt"], kept["answer"]) == (1, outcome("error"))
    told = " ".join(site.run("explain", site.studies["refused"]).out.split())
    assert "ehr said to attempt 1 with fhir-bundle.json" in told
    assert f"error business-rule: {WORDS} at Bundle.entry[0]" in told


def test_a_warning_that_comes_with_success_is_kept_and_hints_are_not(site: Site) -> None:
    """A refusal for now, then success with a warning: one answer is kept of each attempt."""
    left = [json.dumps(outcome("error")).replace("business-rule", "transient")]

    def judge(method: str, path: str, body: bytes) -> Response | None:
        if method != "POST":
            return None
        if left:
            return Response(left.pop(), 409, {"Content-Type": "application/fhir+json"})
        entries = json.loads(body)["entry"]
        hint = {"response": {"status": "201", "outcome": outcome("information")}}
        warned = {"response": {"status": "201", "location": "Device/1", "outcome": outcome("warning")}}
        answer = {"resourceType": "Bundle", "type": "transaction-response", "entry": [warned, *[hint] * len(entries)]}
        answer["entry"] = answer["entry"][: len(entries)]
        return Response(json.dumps(answer), 200, {"Content-Type": "application/fhir+json"})

    site.proxy.judge = judge
    site.service.announce(site.studies["warned"])
    delivery = site.deliver("warned")
    assert (delivery["state"], delivery["attempts"], delivery["receipt"]) == ("delivered", 2, "Device/1")
    first, second = site.answers(delivery)
    assert first["answer"]["issue"][0]["code"] == "transient"
    assert second["answer"]["entry"][0]["response"]["outcome"] == outcome("warning")


def test_a_second_key_is_published_at_once_and_signs_later(site: Site) -> None:
    (old,) = site.service.http.get("/.well-known/jwks.json").json()["keys"]
    changed = site.run("keys", "new", site.keys, "--algorithm", "RS384")
    assert changed.code == 0, changed.said
    new, still = site.service.http.get("/.well-known/jwks.json").json()["keys"]
    assert still == old
    assert (new["kty"], new["alg"]) == ("RSA", "RS384")
    assert not new.keys() & {"d", "p", "q", "dp", "dq", "qi"}
    told = site.run("keys", "list").out
    assert [line.split("│")[3].strip() for line in told.splitlines() if old["kid"] in line] == ["signs"]
    assert [line.split("│")[3].strip() for line in told.splitlines() if new["kid"] in line] == ["next"]
    assert json.loads(site.run("keys", "list", "--jwks").out) == {"keys": [new, old]}
    again = site.run("keys", "new", site.keys)
    assert (again.code, "waits to begin already" in again.said) == (2, True)
    assert site.keys.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("path", ["/deliveries/none/answers", "/deliveries/%00/answers"])
def test_answers_of_what_is_not_there(path: str, site: Site) -> None:
    answer = site.service.http.get(path)
    assert (answer.status_code, answer.json()) == (200, []) if "none" in path else answer.status_code == 422
