"""What Wetread asks an EHR to tell: a FHIR R4 Subscription, classic or of the Subscriptions R5 Backport IG 1.1.0.

Sources: FHIR R4 subscription.html (criteria is a search; without a payload the server sends an empty POST); IG 1.1.0,
profile backport-subscription (criteria is the topic's canonical URL, its filter an extension of it).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

IG = "http://hl7.org/fhir/uv/subscriptions-backport/StructureDefinition"
REASON = "Wetread hears of imaging orders and studies"
SIGNED = "Authorization: Bearer "


@dataclass(frozen=True)
class Wanted:
    """One subscription. `criteria` is a search (`ServiceRequest?`) or, with `topic_filter` not None, a topic's
    canonical URL, to which `topic_filter` (a search, may be empty) is added. `heartbeat_s` 0: no heartbeats."""

    criteria: str
    endpoint: str
    token: str
    topic_filter: str | None = None
    heartbeat_s: int = 0
    timeout_s: int = 0

    @property
    def is_backport(self) -> bool:
        """Whether it is one of the Backport IG."""
        return self.topic_filter is not None


def build_subscription(wanted: Wanted, subscription_id: str = "") -> Json:
    """The Subscription resource, to be created or (with an id) put in the place of one that is there."""
    channel: Json = {"type": "rest-hook", "endpoint": wanted.endpoint, "header": [SIGNED + wanted.token]}
    resource: Json = {"resourceType": "Subscription", "status": "requested", "reason": REASON}
    if subscription_id:
        resource["id"] = subscription_id
    if wanted.is_backport:
        resource["meta"] = {"profile": [f"{IG}/backport-subscription"]}
        if wanted.topic_filter:
            extension = {"url": f"{IG}/backport-filter-criteria", "valueString": wanted.topic_filter}
            resource["_criteria"] = {"extension": [extension]}
        channel |= _backport_channel(wanted)
    return {**resource, "criteria": wanted.criteria, "channel": channel}


def _backport_channel(wanted: Wanted) -> Json:
    periods = (("backport-heartbeat-period", wanted.heartbeat_s), ("backport-timeout", wanted.timeout_s))
    extensions = [{"url": f"{IG}/{name}", "valueUnsignedInt": seconds} for name, seconds in periods if seconds]
    content = {"url": f"{IG}/backport-payload-content", "valueCode": "id-only"}
    return {
        **({"extension": extensions} if extensions else {}),
        "payload": "application/fhir+json",
        "_payload": {"extension": [content]},
    }


def is_of(resource: Json, wanted: Wanted) -> bool:
    """Whether a Subscription of the server is this one: by where it reports to and what about."""
    channel = resource.get("channel")
    endpoint = channel.get("endpoint") if isinstance(channel, dict) else None
    return endpoint == wanted.endpoint and resource.get("criteria") == wanted.criteria


def differs(resource: Json, wanted: Wanted) -> bool:
    """Whether the server's Subscription has to be written anew: it carries another token, or reports otherwise. A
    header that the server does not show (it is a secret) counts as the right one."""
    asked, channel = build_subscription(wanted), resource.get("channel")
    if not isinstance(channel, dict):
        return True
    shown = channel.get("header")
    other_token = bool(shown) and shown != asked["channel"]["header"]
    other_filter = _strings(resource.get("_criteria")) != _strings(asked.get("_criteria"))
    other_periods = _strings(channel) != _strings(asked["channel"])
    return other_token or other_filter or other_periods or channel.get("payload") != asked["channel"].get("payload")


def _strings(element: object) -> Sequence[tuple[str, str]]:
    """URL and value of each extension of the IG that an element has, in order of the URLs."""
    extensions = element.get("extension") if isinstance(element, dict) else None
    found = [e for e in extensions if isinstance(e, dict)] if isinstance(extensions, list) else []
    of_guide = [e for e in found if str(e.get("url", "")).startswith(f"{IG}/")]
    return sorted((str(e["url"]), str(next((v for k, v in e.items() if k.startswith("value")), ""))) for e in of_guide)
