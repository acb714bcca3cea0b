"""The service beside an EHR of the Subscriptions R5 Backport IG, for the tests of one with the other."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
from sqlmodel import Session, col, select

from deploy.hospital.process import LOOPBACK, free_port
from middleware.store.heard import HeardMessage
from middleware.store.queries import open_engine
from tests.backport_server import BackportServer
from tests.serving import Service

Json = dict[str, Any]

TOKEN = "the-token-of-the-callback-1"
TOPICS = {"http://ehr.example/topic/order": "ServiceRequest", "http://ehr.example/topic/study": "ImagingStudy"}


class Site:
    """The EHR, and the service that hears from it. What is not asked for by a test is too rare to help."""

    def __init__(self, folder: Path, ehr: BackportServer, **settings: Any) -> None:
        self.ehr = ehr
        (folder / "pacs").mkdir()
        self.service = Service(folder / "service", self._settings(folder, settings))
        self.engine = open_engine(f"sqlite:///{self.service.data_dir}/wetread.sqlite")
        self.callback = f"{self.service.api}/fhir/notifications"

    def _settings(self, folder: Path, settings: Json) -> Json:
        topics = {kind: topic for topic, kind in TOPICS.items()}
        events = {"kind": "backport", "topics": topics, "heartbeat_s": 0, "poll_s": 600, "check_s": 600, **settings}
        return {
            "pacs": {"folder": str(folder / "pacs")},
            "triton": {"url": f"{LOOPBACK}:{free_port()}"},
            "retry": {"attempts": 1, "first_wait_s": 0.1, "longest_wait_s": 0.5},
            "hl7_listener": {"port": free_port()},
            "ehr": {"url": self.ehr.url},
            "ehr_events": {"callback_url": "http://x/fhir/notifications", **events},
        }

    def start(self) -> None:
        address = {"WETREAD_EHR_EVENTS__CALLBACK_URL": self.callback, "WETREAD_EHR_EVENTS__TOKEN": TOKEN}
        self.service.start("tests.hearing_service:main", **address)

    def is_quiet(self) -> bool:
        """Whether both subscriptions are active and no request comes any more."""
        before = len(self.ehr.requests)
        time.sleep(0.4)
        return self.statuses() == ["active", "active"] and len(self.ehr.requests) == before

    def statuses(self) -> list[str]:
        return [one["status"] for one in self.ehr.subscriptions().values()]

    def subscription(self) -> str:
        """The name of the subscription for orders."""
        return next(n for n, one in self.ehr.subscriptions().items() if TOPICS[one["criteria"]] == "ServiceRequest")

    def order(self, **more: Any) -> str:
        """Order something; the name of the ServiceRequest."""
        made = self.ehr.put(new_order(**more))
        return f"ServiceRequest/{made['id']}"

    def heard(self, name: str) -> list[HeardMessage]:
        query = select(HeardMessage).where(col(HeardMessage.control_id).startswith(f"{name}/"))
        with Session(self.engine) as session:
            return list(session.exec(query))

    def is_applied(self, name: str) -> bool:
        rows = self.heard(name)
        return [(row.state, row.repeats) for row in rows] == [("applied", 0)]

    def post(self, body: object, token: str = TOKEN) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}"}
        if isinstance(body, bytes):
            return httpx.post(self.callback, headers=headers, content=body, trust_env=False)
        return httpx.post(self.callback, headers=headers, json=body, trust_env=False)


def new_order(**more: Any) -> Json:
    accession = {"type": {"coding": [{"code": "ACSN"}]}, "value": f"A{uuid4().hex[:12]}"}
    subject = {"identifier": {"value": "M-Canary", "system": "urn:oid:1.2.3"}}
    return {
        "resourceType": "ServiceRequest",
        "identifier": [accession],
        "status": "active",
        "intent": "order",
        "subject": subject,
        **more,
    }


def until(look: Callable[[], Any], within_s: float = 20.0) -> Any:
    """What `look` gives as soon as it is anything."""
    deadline = time.monotonic() + within_s
    while not (found := look()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return found


@contextmanager
def hearing(folder: Path, ehr: BackportServer | None = None, **settings: Any) -> Iterator[Site]:
    """A service that has just become quiet."""
    server = ehr or BackportServer(TOPICS)
    made = Site(folder, server, **settings)
    made.start()
    try:
        yield made
    finally:
        code = made.service.stop()
        server.stop()
    assert code == 0
    assert "Traceback" not in made.service.log()
    assert "Canary" not in made.service.log()
