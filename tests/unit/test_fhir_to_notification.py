"""FHIR Subscription notifications: the guide's own examples are read, and what is none is refused with a reason."""

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mappings.inputs.fhir_to_notification import Notification, UnreadableNotification, read_notification

Json = dict[str, Any]
SUBSCRIPTION = "https://example.org/fhir/Subscription/admission"


def parameters(kind: str, *events: Json, since: object = "2", **more: Any) -> Json:
    """A status as the guide writes it in R4."""
    values: list[Json] = [
        {"name": "subscription", "valueReference": {"reference": SUBSCRIPTION}},
        {"name": "topic", "valueCanonical": "http://hl7.org/SubscriptionTopic/admission"},
        {"name": "status", "valueCode": "active"},
        {"name": "type", "valueCode": kind},
        {"name": "events-since-subscription-start", "valueString": since},
    ]
    told = [{"name": "notification-event", "part": list(event.values())} for event in events]
    kept = [value for value in values if value["name"] not in more]
    return {"resourceType": "Parameters", "parameter": [*kept, *more.values(), *told]}


def told(number: object, focus: str = "") -> Json:
    parts: Json = {"number": {"name": "event-number", "valueString": number}}
    if focus:
        parts["focus"] = {"name": "focus", "valueReference": {"reference": focus}}
    return parts


def bundle(status: Json, *entries: Json) -> Json:
    return {"resourceType": "Bundle", "type": "history", "entry": [{"resource": status}, *entries]}


def test_handshake_and_heartbeat() -> None:
    assert read_notification(bundle(parameters("handshake", since="0"))) == Notification(
        "handshake", "Subscription/admission", "active", 0
    )
    heartbeat = read_notification(bundle(parameters("heartbeat", since="17")))
    assert (heartbeat.type, heartbeat.latest) == ("heartbeat", 17)


def test_events_with_their_numbers_and_what_they_are_about() -> None:
    events = (told("21", "https://example.org/fhir/Encounter/1"), told("22", "Encounter/2/_history/3"), told(23))
    read = read_notification(bundle(parameters("event-notification", *events, since="23")))
    assert read.event_numbers == (21, 22, 23)
    assert read.focuses == ("Encounter/1", "Encounter/2")
    assert read.latest == 23


def test_status_of_r4b_is_read_as_well() -> None:
    status = {
        "resourceType": "SubscriptionStatus",
        "status": "active",
        "type": "event-notification",
        "eventsSinceSubscriptionStart": "2",
        "notificationEvent": [{"eventNumber": "2", "focus": {"reference": "Encounter/1"}}],
        "subscription": {"reference": SUBSCRIPTION},
    }
    expected = Notification("event-notification", "Subscription/admission", "active", 2, (2,), ("Encounter/1",))
    assert read_notification(bundle(status)) == expected


def test_count_that_is_not_stated_is_not_known() -> None:
    status = parameters("heartbeat")
    status["parameter"] = [p for p in status["parameter"] if p["name"] != "events-since-subscription-start"]
    read = read_notification(bundle(status))
    assert (read.events_since_start, read.latest) == (None, None)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (None, "no Bundle"),
        ([], "no Bundle"),
        ("text", "no Bundle"),
        ({"resourceType": "ServiceRequest"}, "no Bundle"),
        ({**bundle(parameters("handshake")), "type": "searchset"}, "no Bundle"),
        ({"resourceType": "Bundle", "type": "history"}, "first entry"),
        ({"resourceType": "Bundle", "type": "history", "entry": "x"}, "first entry"),
        (bundle({"resourceType": "Patient"}), "first entry"),
        (bundle({"resourceType": "Parameters"}), "type"),
        (bundle(parameters("gossip")), "type"),
        (bundle(parameters("heartbeat", subscription={"name": "subscription"})), "subscription"),
        (bundle(parameters("heartbeat", since="many-canary")), "no number"),
        (bundle(parameters("heartbeat", since="-1")), "no number"),
        (bundle(parameters("heartbeat", since=True)), "no number"),
        (bundle(parameters("heartbeat", since="9" * 30)), "no number"),
        (bundle(parameters("heartbeat", since="\u0663")), "no number"),
        (bundle(parameters("event-notification", told("x"))), "no number"),
    ],
)
def test_what_is_no_notification_is_refused_with_a_reason(body: object, reason: str) -> None:
    with pytest.raises(UnreadableNotification, match=reason) as refused:
        read_notification(body)
    assert "canary" not in str(refused.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["name", "part", "parameter", "resource", "valueString", "valueReference", "reference", "resourceType"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=15,
)


@settings(deadline=None)
@given(st.lists(JSON, max_size=4), JSON)
def test_nothing_else_is_raised(values: list[object], entry: object) -> None:
    status = parameters("event-notification")
    broken = {**status, "parameter": [*status["parameter"], *values]}
    for body in (bundle(broken), {"resourceType": "Bundle", "type": "history", "entry": [entry]}):
        with contextlib.suppress(UnreadableNotification):
            read_notification(body)
