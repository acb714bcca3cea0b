"""`wetread deliveries`, `retry` and `replay`, and the same over HTTP, at a service whose RIS is awkward."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.hospital.ris import Behaviour
from deploy.hospital.ris_process import RunningRis, start_ris
from middleware.store.artifacts import ArtifactStore
from middleware.store.queries import Store, open_engine
from middleware.store.tables import ArtifactRecord, StudyEvent
from tests.arrivals import until
from tests.commands import Ended, run_wetread
from tests.outgoing import NOW, oru
from tests.serving import Service

TOKEN = "a-token-of-this-test"
SIGNED = {"Authorization": f"Bearer {TOKEN}"}
WORD = {"person": "kim", "reason": "the interface was mended"}
SLOW = {"first_wait_s": 0.1, "longest_wait_s": 0.5, "probe_every_s": 0.5, "down_after": 100}


@dataclass
class Desk:
    """The service with its RIS and its store."""

    service: Service
    ris: RunningRis
    store: Store
    artifacts: ArtifactStore

    def release(self, name: str, study_uid: str) -> None:
        """A released result of a study with one ORU, as a reading leaves it behind; nothing is planned yet."""
        event = {"idempotency_key": name, "source": "s", "kind": "x", "study_instance_uid": study_uid, "job_id": name}
        self.store.accept_event(StudyEvent(**event, received_at=NOW))
        digest = self.artifacts.put(oru(name)).digest
        record = {"artifact_id": name, "job_id": name, "revision": 1, "name": "oru.hl7", "kind": "oru"}
        self.store.save_artifacts([ArtifactRecord(**record, media_type="x", digest=digest, size_bytes=1)])
        facts = {"findings": "f"}
        self.store.update_job(name, NOW, state="reading")
        self.store.update_job(name, NOW, state="released", protocol="prostate_mri", facts=facts)

    def run(self, *command: str, columns: int = 100) -> Ended:
        return run_wetread(self.service.folder, *command, COLUMNS=str(columns))

    def delivery(self, name: str) -> dict[str, Any]:
        found: list[dict[str, Any]] = self.service.http.get(f"/jobs/{name}/deliveries").json()
        return found[-1]

    def wait_for(self, name: str, *states: str) -> dict[str, Any]:
        until(lambda: self.delivery(name)["state"] in states, what=f"{name} {states}")
        return self.delivery(name)

    def received(self, name: str) -> int:
        return len([m for m in self.ris.received() if name in m.text])

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return self.service.http.post(path, json=body, headers=headers)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("desk")
    with start_ris(folder / "ris") as ris:
        settings = {
            "ris": {"host": ris.host, "port": ris.port, "ack_timeout_s": 5.0},
            "deliver": {"ris": SLOW},
        }
        service = Service(folder / "service", settings)
        service.start(WETREAD_API__TOKEN=TOKEN)
        store = Store(open_engine(f"sqlite:///{service.data_dir}/wetread.sqlite"))
        yield Desk(service, ris, store, ArtifactStore(str(service.data_dir / "artifacts")))
        store.close()
        assert service.stop() == 0
        assert "Traceback" not in service.log()


@pytest.fixture(autouse=True)
def _polite(desk: Desk) -> Iterator[None]:
    yield
    desk.ris.behave(Behaviour.ACCEPT)


def test_without_any_reading_there_is_nothing_to_list(tmp_path: Path) -> None:
    ended = run_wetread(tmp_path, "deliveries")
    assert ended.code == 2
    assert "nothing was ever read here" in ended.said


def test_a_released_result_is_replayed_and_twice_has_no_further_effect(desk: Desk) -> None:
    desk.release("replayed", "1.2.3.1")
    ended = desk.run("replay", "1.2.3.1", "--reason", "the RIS was configured late")
    assert ended.code == 0, ended.said
    assert "oru.hl7 to ris: the service sends it now." in ended.out
    desk.wait_for("replayed", "delivered")
    again = desk.run("replay", "1.2.3.1", "--reason", "the RIS was configured late")
    assert "Nothing is sent" in again.out
    assert desk.received("replayed") == 1


def test_replay_again_sends_the_same_bytes_once_for_each_reason(desk: Desk) -> None:
    desk.release("anew", "1.2.3.2")
    desk.run("replay", "1.2.3.2", "--reason", "first")
    desk.wait_for("anew", "delivered")
    for _ in range(2):
        ended = desk.run("replay", "1.2.3.2", "--again", "--reason", "the RIS was restored from a backup")
        assert ended.code == 0, ended.said
        until(lambda: {d["state"] for d in desk.service.http.get("/jobs/anew/deliveries").json()} == {"delivered"})
    messages = [m for m in desk.ris.received() if "anew" in m.text]
    assert len(messages) == 2
    assert len({m.text for m in messages}) == 1
    assert "(again)" in desk.run("deliveries", "--study", "1.2.3.2", columns=160).out


def test_a_dead_one_is_listed_shown_and_tried_again(desk: Desk) -> None:
    desk.release("refused", "1.2.3.3")
    desk.ris.behave(Behaviour.REJECT)
    desk.run("replay", "1.2.3.3", "--reason", "x")
    identity = desk.wait_for("refused", "dead")["delivery_id"]
    listed = desk.run("deliveries", "--state", "dead")
    assert identity[:8] in listed.out
    assert "1 dead and 0 ambiguous wait for a person" in listed.out
    assert re.search(rf"{identity[:8]} +dead +ris +oru.hl7 +1 +1 +20", listed.out)
    assert identity[:8] not in desk.run("deliveries", "--state", "ambiguous").out
    shown = desk.run("deliveries", "show", identity[:8], "--save", "saved.hl7").out
    assert re.search(r"reason +ris: message .* rejected it \(AR\)", shown)
    assert "sha256 " in shown
    assert (desk.service.folder / "saved.hl7").read_bytes() == oru("refused")
    desk.ris.behave(Behaviour.ACCEPT)
    ended = desk.run("retry", identity[:8], "--reason", "mended", "--person", "kim")
    assert ended.code == 0, ended.said
    desk.wait_for("refused", "delivered")
    assert "retry by kim: mended" in desk.run("deliveries", "show", identity).out


def test_an_ambiguous_one_waits_until_a_person_says_that_it_arrived(desk: Desk) -> None:
    desk.release("unsure", "1.2.3.4")
    desk.ris.behave(Behaviour.CLOSE)
    desk.run("replay", "1.2.3.4", "--reason", "x")
    identity = desk.wait_for("unsure", "ambiguous")["delivery_id"]
    desk.ris.behave(Behaviour.ACCEPT)
    ended = desk.run("retry", identity, "--delivered", "--person", "kim", "--reason", "seen in the worklist")
    assert ended.code == 0, ended.said
    assert desk.delivery("unsure")["receipt"] == "kim found it at the destination: seen in the worklist"
    assert desk.received("unsure") == 1


def test_trying_an_ambiguous_one_again_says_what_may_be_doubled(desk: Desk) -> None:
    desk.release("doubled", "1.2.3.5")
    desk.ris.behave(Behaviour.CLOSE)
    desk.run("replay", "1.2.3.5", "--reason", "x")
    identity = desk.wait_for("doubled", "ambiguous")["delivery_id"]
    desk.ris.behave(Behaviour.ACCEPT)
    ended = desk.run("retry", identity, "--reason", "not in the worklist")
    assert "the RIS has the report twice" in ended.out
    desk.wait_for("doubled", "delivered")
    assert desk.received("doubled") == 2
    refused = desk.run("retry", identity, "--reason", "once more")
    assert refused.code == 2
    assert "delivered already" in refused.said


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("retry", "no-such-id", "--reason", "x"), "no delivery begins with"),
        (("replay", "9.9.9", "--reason", "x"), "no reading of '9.9.9'"),
        (("replay", "1.2.3.1", "--destination", "pacs", "--reason", "x"), "pacs is not configured"),
        (("retry", "x", "--reason", " "), "no delivery begins with"),
        (("deliveries", "show", "zzz"), "no delivery begins with"),
    ],
)
def test_what_cannot_be_done_is_told(command: tuple[str, ...], words: str, desk: Desk) -> None:
    desk.release("replayed", "1.2.3.1")
    ended = desk.run(*command, columns=200)
    assert ended.code == 2
    assert words in ended.said


# The same over HTTP


def test_changing_needs_the_token(desk: Desk) -> None:
    wrong: tuple[dict[str, str], ...] = (
        {},
        {"Authorization": TOKEN},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": "Bearer x"},
    )
    for headers in wrong:
        for path in ("/deliveries/x/retry", "/studies/1.2/replay"):
            answer = desk.post(path, WORD, **headers)
            assert answer.status_code == 401, headers
            assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert desk.post("/deliveries/x/retry", WORD, **SIGNED).status_code == 404
    assert desk.post("/studies/1.2/replay", WORD, **SIGNED).status_code == 404


def test_without_a_token_nothing_that_changes_is_offered(tmp_path: Path) -> None:
    service = Service(tmp_path / "service", {})
    service.start()
    paths = service.http.get("/openapi.json").json()["paths"]
    assert "/deliveries" in paths
    assert not {"/deliveries/{delivery_id}/retry", "/studies/{study_uid}/replay"} & set(paths)
    assert service.http.post("/deliveries/x/retry", json=WORD, headers=SIGNED).status_code == 404
    service.stop()


def test_replay_and_retry_over_http(desk: Desk) -> None:
    desk.release("http", "1.2.3.6")
    desk.ris.behave(Behaviour.REJECT)
    (going,) = desk.post("/studies/1.2.3.6/replay", {**WORD, "destination": "ris"}, **SIGNED).json()
    assert going["state"] == "pending"
    desk.wait_for("http", "dead")
    found = desk.service.http.get("/deliveries", params={"state": "dead", "destination": "ris"}).json()
    assert going["delivery_id"] in [d["delivery_id"] for d in found]
    refused = desk.post(f"/deliveries/{going['delivery_id']}/retry", {**WORD, "delivered": True}, **SIGNED)
    assert (refused.status_code, "only an ambiguous one" in refused.json()["detail"]) == (409, True)
    desk.ris.behave(Behaviour.ACCEPT)
    assert desk.post(f"/deliveries/{going['delivery_id']}/retry", WORD, **SIGNED).status_code == 200
    desk.wait_for("http", "delivered")
    again = {**WORD, "again": True}
    first = desk.post("/studies/1.2.3.6/replay", again, **SIGNED, **{"Idempotency-Key": "k"})
    second = desk.post("/studies/1.2.3.6/replay", again, **SIGNED, **{"Idempotency-Key": "k"})
    assert (len(first.json()), second.json()) == (1, [])
    people = {d.person for d in desk.store.decisions("http")}
    assert people == {"kim"}


@pytest.mark.parametrize("body", [{}, {"person": " ", "reason": "x"}, {**WORD, "destination": "fax"}, {**WORD, "x": 1}])
def test_a_word_that_is_none_is_refused(body: Any, desk: Desk) -> None:
    answer = desk.post("/studies/1.2.3.1/replay", body, **SIGNED)
    assert answer.status_code == 422, json.dumps(body)
