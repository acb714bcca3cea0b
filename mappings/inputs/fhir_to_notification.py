"""A FHIR Subscription notification to what it announces. Nothing in it is taken for true: it is a reason to look.

Source: Subscriptions R5 Backport IG 1.1.0: a Bundle of type `history` whose first entry is the status, in R4 a
`Parameters` (backport-subscription-status-r4: subscription, status, type, events-since-subscription-start,
notification-event with event-number and focus), in R4B a `SubscriptionStatus`.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from mappings.inputs.fhir_elements import Json, as_dict, as_list, as_text, normalise_reference

NotificationType = Literal["handshake", "heartbeat", "event-notification", "query-status", "query-event"]
"""subscription-notification-type."""

MAX_NUMBER = 2**53
"""A larger event number is none that a server counted to."""


class UnreadableNotification(Exception):
    """It is no notification; the message says why, in words for its sender and without what it holds."""


@dataclass(frozen=True)
class Notification:
    """What a server announces of one subscription. `events_since_start` counts events up to and with this notification,
    `event_numbers` are those it tells of, `focuses` the `Type/id` that they are about (as far as stated)."""

    type: NotificationType
    subscription: str
    status: str = ""
    events_since_start: int | None = None
    event_numbers: tuple[int, ...] = ()
    focuses: tuple[str, ...] = ()

    @property
    def latest(self) -> int | None:
        """The highest event number that it speaks of."""
        return max((*self.event_numbers, *filter(None, (self.events_since_start,))), default=self.events_since_start)


def read_notification(bundle: object) -> Notification:
    """The notification in a Bundle (given as JSON). Raises UnreadableNotification."""
    resource = as_dict(bundle)
    if resource.get("resourceType") != "Bundle" or resource.get("type") != "history":
        raise UnreadableNotification("the body is no Bundle of type history")
    entries = as_list(resource.get("entry"))
    return read_status(as_dict(as_dict(entries[0]).get("resource")) if entries else {})


def read_status(resource: Json) -> Notification:
    """The notification in its status, a Parameters or SubscriptionStatus. Raises UnreadableNotification."""
    values = _to_values(resource)
    if values is None:
        raise UnreadableNotification("the first entry is no status (Parameters or SubscriptionStatus)")
    kind, subscription = as_text(values.get("type")), as_text(as_dict(values.get("subscription")).get("reference"))
    if kind not in get_args(NotificationType):
        raise UnreadableNotification("the status names no type of notification")
    if not subscription:
        raise UnreadableNotification("the status names no subscription")
    events = [as_dict(event) for event in as_list(values.get("notificationEvent"))]
    numbers = [_read_number(event.get("eventNumber"), "event-number") for event in events]
    focuses = (as_text(as_dict(event.get("focus")).get("reference")) for event in events)
    return Notification(
        type=kind,  # type: ignore[arg-type]
        subscription=normalise_reference(subscription),
        status=as_text(values.get("status")),
        events_since_start=_read_number(values.get("eventsSinceSubscriptionStart"), "events-since-subscription-start"),
        event_numbers=tuple(number for number in numbers if number is not None),
        focuses=tuple(dict.fromkeys(normalise_reference(focus) for focus in focuses if focus)),
    )


def _read_number(value: object, name: str) -> int | None:
    """A count, which the IG writes as a string; None where it is not stated."""
    if value is None:
        return None
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else as_text(value)
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(MAX_NUMBER)) and int(text) <= MAX_NUMBER):
        raise UnreadableNotification(f"{name} is no number")
    return int(text)


_NAMES = {
    "events-since-subscription-start": "eventsSinceSubscriptionStart",
    "notification-event": "notificationEvent",
    "event-number": "eventNumber",
}
"""R4's parameter names, in the words of SubscriptionStatus."""


def _to_values(resource: Json) -> Json | None:
    """The status as a SubscriptionStatus has it; None for any other resource."""
    if resource.get("resourceType") == "SubscriptionStatus":
        return resource
    return _parameters(resource.get("parameter")) if resource.get("resourceType") == "Parameters" else None


def _parameters(parameters: object) -> Json:
    values: Json = {}
    for parameter in map(as_dict, as_list(parameters)):
        name = as_text(parameter.get("name"))
        value = _value(parameter)
        if name == "notification-event":
            values.setdefault("notificationEvent", []).append(_parameters(parameter.get("part")))
        elif name:
            values.setdefault(_NAMES.get(name, name), value)
    return values


def _value(parameter: Json) -> Any:
    return next((value for key, value in parameter.items() if key.startswith("value")), None)
