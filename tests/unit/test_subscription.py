"""What we ask an EHR to tell: the guide's elements, and when a subscription that is there is not what we want."""

from dataclasses import replace
from typing import Any

import pytest
from fhir.resources.R4B.subscription import Subscription

from mappings.outputs.subscription import Wanted, build_subscription, differs, is_of
from middleware.settings import EhrEventSettings
from middleware.subscribing import wanted_subscriptions

Json = dict[str, Any]

ENDPOINT = "https://wetread.example/fhir/notifications"
TOKEN = "a-token-of-16-characters"
CLASSIC = Wanted("ServiceRequest?", ENDPOINT, TOKEN)
TOPIC = "http://ehr.example/topics/order"
BACKPORT = Wanted(TOPIC, ENDPOINT, TOKEN, "ServiceRequest?category=imaging", 60, 30)
GUIDE = "http://hl7.org/fhir/uv/subscriptions-backport/StructureDefinition/"


@pytest.mark.parametrize("wanted", [CLASSIC, BACKPORT, replace(BACKPORT, topic_filter="", heartbeat_s=0, timeout_s=0)])
def test_it_is_valid_r4(wanted: Wanted) -> None:
    Subscription.model_validate(build_subscription(wanted, "7"))


def test_classic_has_a_search_and_no_payload() -> None:
    assert build_subscription(CLASSIC) == {
        "resourceType": "Subscription",
        "status": "requested",
        "reason": "Wetread hears of imaging orders and studies",
        "criteria": "ServiceRequest?",
        "channel": {"type": "rest-hook", "endpoint": ENDPOINT, "header": [f"Authorization: Bearer {TOKEN}"]},
    }


def test_backport_has_what_the_guide_asks_for() -> None:
    made = build_subscription(BACKPORT, "7")
    assert (made["id"], made["criteria"]) == ("7", TOPIC)
    assert made["meta"] == {"profile": [GUIDE + "backport-subscription"]}
    assert made["_criteria"]["extension"] == [
        {"url": GUIDE + "backport-filter-criteria", "valueString": "ServiceRequest?category=imaging"}
    ]
    channel = made["channel"]
    assert channel["extension"] == [
        {"url": GUIDE + "backport-heartbeat-period", "valueUnsignedInt": 60},
        {"url": GUIDE + "backport-timeout", "valueUnsignedInt": 30},
    ]
    assert channel["payload"] == "application/fhir+json"
    assert channel["_payload"]["extension"] == [{"url": GUIDE + "backport-payload-content", "valueCode": "id-only"}]


@pytest.mark.parametrize("wanted", [CLASSIC, BACKPORT])
def test_what_was_asked_for_is_what_is_wanted(wanted: Wanted) -> None:
    made = {**build_subscription(wanted, "7"), "status": "active"}
    assert is_of(made, wanted)
    assert not differs(made, wanted)
    hidden = {**made, "channel": {k: v for k, v in made["channel"].items() if k != "header"}}
    assert not differs(hidden, wanted), "a server may keep the header to itself"


@pytest.mark.parametrize(
    "other",
    [
        replace(BACKPORT, token="another-token-of-16"),
        replace(BACKPORT, heartbeat_s=30),
        replace(BACKPORT, heartbeat_s=0),
        replace(BACKPORT, topic_filter=""),
        replace(BACKPORT, topic_filter=None, heartbeat_s=0, timeout_s=0),
    ],
)
def test_what_has_to_be_written_anew(other: Wanted) -> None:
    assert is_of(build_subscription(other), BACKPORT)
    assert differs(build_subscription(other), BACKPORT)


@pytest.mark.parametrize(
    "there",
    [
        build_subscription(replace(CLASSIC, criteria="ServiceRequest?status=active")),
        build_subscription(replace(CLASSIC, endpoint=f"{ENDPOINT}/other")),
        {},
        {"criteria": "ServiceRequest?", "channel": "x"},
        {"criteria": "ServiceRequest?", "channel": {"endpoint": [ENDPOINT]}},
    ],
)
def test_subscription_of_somebody_else_is_not_ours(there: Json) -> None:
    assert not is_of(there, CLASSIC)


def test_settings_say_which_subscriptions_are_wanted() -> None:
    values = {"callback_url": ENDPOINT, "token": TOKEN, "filters": {"ServiceRequest": "category=imaging"}}
    classic = wanted_subscriptions(EhrEventSettings.model_validate(values))
    assert [one.criteria for one in classic] == ["ServiceRequest?category=imaging", "ImagingStudy?"]
    topics = {"ServiceRequest": TOPIC, "ImagingStudy": "http://ehr.example/topics/study"}
    backport = wanted_subscriptions(EhrEventSettings.model_validate({**values, "kind": "backport", "topics": topics}))
    assert backport[0] == BACKPORT
    assert (backport[1].criteria, backport[1].topic_filter) == ("http://ehr.example/topics/study", "")
