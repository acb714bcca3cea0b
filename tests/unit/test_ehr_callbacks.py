"""The callback's answers where nobody listens and where the store is down; and what notifications add up to."""

from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.pool import StaticPool

from mappings.inputs.fhir_to_notification import Notification
from middleware.api import subscriptions
from middleware.intake.ehr_notices import MAX_NAMED, EhrNotices
from middleware.store.ehr_events import EhrEventStore

Json = dict[str, Any]

TOKEN = "the-token-of-the-callback-1"
SIGNED = {"Authorization": f"Bearer {TOKEN}"}
OURS = "Subscription/1"


@pytest.fixture
def engine() -> Engine:
    return create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})


@pytest.fixture
def store(engine: Engine) -> EhrEventStore:
    made = EhrEventStore(engine)
    made.remember_subscription("ours", OURS)
    return made


def notices_of(store: EhrEventStore, *, is_backport: bool = True) -> EhrNotices:
    return EhrNotices(TOKEN, store, is_backport=is_backport)


async def ask(notices: EhrNotices | None, method: str, path: str = "/fhir/notifications", **more: Any) -> int:
    """The status of the answer to a signed callback."""
    app = FastAPI()
    app.include_router(subscriptions.router)
    if notices is not None:
        app.state.ehr_notices = notices
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return (await client.request(method, path, headers=SIGNED, **more)).status_code


def heartbeat(count: str = "0", subscription: str = OURS) -> Json:
    values = [
        {"name": "subscription", "valueReference": {"reference": subscription}},
        {"name": "status", "valueCode": "active"},
        {"name": "type", "valueCode": "heartbeat"},
        {"name": "events-since-subscription-start", "valueString": count},
    ]
    status = {"resourceType": "Parameters", "parameter": values}
    return {"resourceType": "Bundle", "type": "history", "entry": [{"resource": status}]}


# Answers


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/fhir/notifications"), ("PUT", "/fhir/notifications/Patient/1")]
)
async def test_where_no_ehr_is_heard_there_is_nothing(method: str, path: str) -> None:
    assert await ask(None, method, path) == 404


async def test_store_that_is_down_answers_503(engine: Engine, store: EhrEventStore) -> None:
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE ehr_subscription"))
    for is_backport, body in ((True, heartbeat()), (False, None)):
        notices = notices_of(store, is_backport=is_backport)
        assert await ask(notices, "POST", json=body) == 503
        assert not notices.wanted.is_set()


async def test_resource_put_to_a_backport_endpoint_is_refused(store: EhrEventStore) -> None:
    assert await ask(notices_of(store), "PUT", "/fhir/notifications/Patient/1", content=b"{}") == 400


@pytest.mark.parametrize("path", ["/fhir/notifications/patient/1", "/fhir/notifications/Patient/a%00b"])
async def test_path_that_names_no_resource_is_refused(store: EhrEventStore, path: str) -> None:
    assert await ask(notices_of(store, is_backport=False), "PUT", path, content=b"{}") == 422


async def test_handshake_is_taken_from_a_subscription_that_is_being_made(store: EhrEventStore) -> None:
    notices = notices_of(store)
    greeting = heartbeat(subscription="Subscription/new")
    greeting["entry"][0]["resource"]["parameter"][2]["valueCode"] = "handshake"
    with notices.registering():
        assert await ask(notices, "POST", json=greeting) == 204
        assert await ask(notices, "POST", json=heartbeat(subscription="Subscription/new")) == 404
    assert await ask(notices, "POST", json=greeting) == 404
    assert await ask(notices, "POST", json=heartbeat()) == 204


@pytest.mark.parametrize("header", [f"bearer {TOKEN}", f"BEARER  {TOKEN} "])
def test_scheme_is_known_in_any_case(store: EhrEventStore, header: str) -> None:
    assert notices_of(store).is_signed(header)


@pytest.mark.parametrize("header", ["", "Bearer", TOKEN, f"Basic {TOKEN}", "Bearer \xff\u0663", f"Bearer {TOKEN[:-1]}"])
def test_anything_else_is_not_signed(store: EhrEventStore, header: str) -> None:
    assert not notices_of(store).is_signed(header)


# What they add up to


def told(kind: Any = "event-notification", *numbers: int, since: int | None = None, focus: str = "") -> Notification:
    return Notification(kind, OURS, "active", since, numbers, (focus,) if focus else ())


@pytest.mark.parametrize(
    ("last", "notifications", "gaps", "latest"),
    [
        (0, [told("event-notification", 1)], [], 1),
        (0, [told("event-notification", 1), told("event-notification", 2, 3)], [], 3),
        (5, [told("event-notification", 8)], [(6, 7)], 8),
        (5, [told("event-notification", 8), told("event-notification", 11)], [(6, 10)], 11),
        (5, [told("event-notification", since=9)], [(6, 8)], 9),
        (5, [told("event-notification", 5)], [], 5),
        (5, [told("event-notification", 3)], [], 5),
        (5, [told("event-notification")], [], 5),
        (5, [told("heartbeat", since=7)], [(6, 7)], 7),
        (5, [told("heartbeat", since=2)], [], 2),
        (5, [told("heartbeat", since=0), told("event-notification", 2)], [(1, 1)], 2),
        (0, [told("event-notification", 7, 6), told("event-notification", 6)], [(1, 5)], 7),
    ],
)
def test_gaps_and_latest_event(
    store: EhrEventStore, last: int, notifications: list[Notification], gaps: list[tuple[int, int]], latest: int
) -> None:
    notices = notices_of(store)
    for notification in notifications:
        notices.note(notification, last)
    assert notices.wanted.is_set()
    pending = notices.collect()
    assert not notices.wanted.is_set()
    assert list(pending.gaps.values()) == gaps
    assert pending.events == {OURS: latest}


def test_heartbeat_without_news_wants_nothing(store: EhrEventStore) -> None:
    notices = notices_of(store)
    notices.note(told("heartbeat", since=5), 5)
    notices.note(told("heartbeat"), 5)
    assert not notices.wanted.is_set()


def test_event_that_is_being_read_is_not_missed(store: EhrEventStore) -> None:
    notices = notices_of(store)
    notices.note(told("event-notification", 1), 0)
    notices.collect()  # and it is being read now
    notices.note(told("event-notification", 2), 0)
    assert notices.collect().gaps == {}


def test_what_was_not_read_waits_on(store: EhrEventStore) -> None:
    notices = notices_of(store)
    notices.note(told("event-notification", 3, focus="ServiceRequest/1"), 0)
    failed = notices.collect()
    notices.note(told("event-notification", 6, focus="ServiceRequest/2"), 0)
    notices.put_back(failed)
    pending = notices.collect()
    assert list(pending.focuses) == ["ServiceRequest/1", "ServiceRequest/2"]
    assert pending.gaps == {OURS: (1, 5)}
    assert pending.events == {OURS: 6}


def test_named_resources_are_limited(store: EhrEventStore) -> None:
    notices = notices_of(store)
    for number in range(1, MAX_NAMED + 100):
        notices.note(told("event-notification", number, focus=f"ServiceRequest/{number}"), 0)
    assert len(notices.collect().focuses) == MAX_NAMED


def test_subscription_under_another_name_counts_from_its_beginning(store: EhrEventStore) -> None:
    store.set_last_event(OURS, 7)
    store.remember_subscription("ours", OURS)
    known = store.subscription(OURS)
    assert known is not None
    assert known.last_event == 7
    store.remember_subscription("ours", "Subscription/2")
    assert store.subscription(OURS) is None
    renamed = store.subscription("Subscription/2")
    assert renamed is not None
    assert renamed.last_event == 0
