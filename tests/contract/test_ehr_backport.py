"""The running service against an EHR of the Subscriptions R5 Backport IG that was written from the guide alone, and
that loses, repeats, forges and fails."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from tests.backport_server import notification
from tests.backport_site import TOKEN, Site, hearing, new_order, until

GUIDE = "http://hl7.org/fhir/uv/subscriptions-backport/StructureDefinition/"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with hearing(tmp_path_factory.mktemp("backport")) as made:
        yield made


@pytest.fixture(autouse=True)
def quiet(request: pytest.FixtureRequest) -> None:
    """Each test of the shared service begins when nothing goes on."""
    if "site" in request.fixturenames:
        made: Site = request.getfixturevalue("site")
        made.ehr.has_status = made.ehr.has_events = True
        made.ehr.next_link = ""
        until(made.is_quiet)


def test_subscriptions_are_asked_for_as_the_guide_says(site: Site) -> None:
    one = site.ehr.subscriptions()[site.subscription()]
    assert one["meta"]["profile"] == [GUIDE + "backport-subscription"]
    assert one["channel"]["payload"] == "application/fhir+json"
    assert one["channel"]["header"] == [f"Authorization: Bearer {TOKEN}"]
    assert len(site.ehr.subscriptions()) == 2


def test_order_is_heard(site: Site) -> None:
    name = site.order()
    until(lambda: site.is_applied(name))


def test_dropped_notification_shows_in_the_next_one_and_is_fetched_by_its_number(site: Site) -> None:
    first = site.order()
    until(lambda: site.is_applied(first))
    number = site.ehr.counts[site.subscription()]
    site.ehr.drops = 2
    names = [site.order() for _ in range(3)]
    for name in names:
        until(lambda name=name: site.is_applied(name))
    bounds = f"eventsSinceNumber={number + 1}&eventsUntilNumber={number + 2}"
    until(lambda: f"GET /fhir/{site.subscription()}/$events?{bounds}" in site.ehr.requests)


def test_event_that_the_search_does_not_show_is_found_by_its_number(site: Site) -> None:
    """The EHR's clock was set back: what it dates now lies before what was read."""
    site.ehr.drops = 1
    name = f"ServiceRequest/{site.ehr.put(new_order(), at=datetime(2020, 1, 1, tzinfo=UTC))['id']}"
    other = site.order()
    until(lambda: site.is_applied(other))
    until(lambda: site.is_applied(name))


def test_dropped_notification_is_found_by_search_where_the_server_keeps_no_events(site: Site) -> None:
    site.ehr.has_events = site.ehr.has_status = False
    site.ehr.drops = 1
    names = [site.order() for _ in range(2)]
    for name in names:
        until(lambda name=name: site.is_applied(name))


def test_dropped_notification_shows_in_a_heartbeat(site: Site) -> None:
    site.ehr.drops = 1
    name = site.order()
    time.sleep(0.5)
    assert site.heard(name) == []
    site.ehr.heartbeat()
    until(lambda: site.is_applied(name))


def test_heartbeat_without_news_asks_the_ehr_nothing(site: Site) -> None:
    before = len(site.ehr.requests)
    site.ehr.heartbeat()
    time.sleep(0.5)
    assert len(site.ehr.requests) == before


def test_notification_that_comes_again_doubles_nothing(site: Site) -> None:
    name, subscription = site.order(), site.subscription()
    until(lambda: site.is_applied(name))
    number = site.ehr.counts[subscription]
    status = site.ehr.status(subscription, "event-notification", (number, name))
    for _ in range(20):
        assert site.post(notification(status, subscription)).status_code == 204
    latest = site.order()
    until(lambda: site.is_applied(latest))
    assert site.is_applied(name)


def test_callbacks_that_come_while_the_ehr_is_read_cost_one_more_reading(site: Site) -> None:
    subscription = site.subscription()
    status = site.ehr.status(subscription, "event-notification", (1, "ServiceRequest/1"))
    before = len(_searches(site))
    site.ehr.open.clear()
    for _ in range(50):
        assert site.post(notification(status, subscription)).status_code == 204
    site.ehr.open.set()
    until(site.is_quiet)
    assert len(_searches(site)) - before <= 2


def _searches(site: Site) -> list[str]:
    return [line for line in site.ehr.requests if line.startswith("GET /fhir/ImagingStudy?_lastUpdated")]


def test_count_that_begins_anew_is_noticed(site: Site) -> None:
    for _ in range(2):
        name = site.order()
        until(lambda name=name: site.is_applied(name))
    site.ehr.count_anew()
    anew = site.order()
    until(lambda: site.is_applied(anew))
    site.ehr.heartbeat()
    until(lambda: "the EHR counts its events anew" in site.service.log())
    until(site.is_quiet)
    site.ehr.drops = 1
    names = [site.order() for _ in range(2)]
    for name in names:
        until(lambda name=name: site.is_applied(name))
    bounds = "eventsSinceNumber=2&eventsUntilNumber=2"
    until(lambda: f"GET /fhir/{site.subscription()}/$events?{bounds}" in site.ehr.requests)


# Forged


def test_callback_without_our_token_is_refused_and_asks_the_ehr_nothing(site: Site) -> None:
    before = len(site.ehr.requests)
    status = site.ehr.status(site.subscription(), "event-notification", (999, "ServiceRequest/1"))
    assert site.post(notification(status, "x"), token="another").status_code == 401
    time.sleep(0.5)
    assert len(site.ehr.requests) == before


def test_notification_of_an_unknown_subscription_is_refused_and_asks_the_ehr_nothing(site: Site) -> None:
    site.ehr.resources["Subscription/forged"] = {"criteria": "x", "status": "active", "id": "forged"}
    statuses = [site.ehr.status("Subscription/forged", kind) for kind in ("event-notification", "handshake")]
    del site.ehr.resources["Subscription/forged"]
    before = len(site.ehr.requests)
    for status in statuses:
        answer = site.post(notification(status, "x"))
        assert answer.status_code == 404
        assert "none of ours" in answer.json()["detail"]
    time.sleep(0.5)
    assert len(site.ehr.requests) == before


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff", b"null", b"[]", b'{"resourceType": "Bundle", "type": "history", "entry": []}', b"[" * 9999],
)
def test_what_is_no_notification_is_refused_with_a_reason(site: Site, body: bytes) -> None:
    before = len(site.ehr.requests)
    answer = site.post(body)
    assert answer.status_code == 400
    assert len(answer.json()["detail"]) > 10
    time.sleep(0.2)
    assert len(site.ehr.requests) == before


def test_forged_event_changes_nothing_that_is_remembered(site: Site) -> None:
    """Signed and yet untrue: it names an event far ahead, an order that is not there, and another server's."""
    subscription = site.subscription()
    status = site.ehr.status(subscription, "event-notification", (10**6, "ServiceRequest/none"))
    status["parameter"][-1]["part"][1]["valueReference"]["reference"] = "http://192.0.2.1/fhir/ServiceRequest/none"
    assert site.post(notification(status, "x")).status_code == 204
    name = site.order()
    until(lambda: site.is_applied(name))
    assert site.heard("ServiceRequest/none") == []
    assert not any("192.0.2.1" in line for line in site.ehr.requests)


def test_too_large_notification_is_refused(site: Site) -> None:
    assert site.post(b" " * (2 << 20)).status_code == 413


@pytest.mark.parametrize("link", ["SELF", "http://192.0.2.1/fhir/ServiceRequest", "SELF&page=0"])
def test_pages_that_go_astray_are_not_followed(site: Site, link: str) -> None:
    site.ehr.next_link = link
    before = site.service.log().count("EHR not read")
    name = site.order()
    until(lambda: site.service.log().count("EHR not read") > before)
    assert site.service.answers()
    assert site.heard(name) == []
    site.ehr.next_link = ""
    until(lambda: site.is_applied(name))
