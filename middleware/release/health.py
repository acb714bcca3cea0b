"""Whether a destination answers: a few failures in a row make it down, any answer makes it well again."""

from collections.abc import Mapping
from datetime import datetime, timedelta

from middleware.settings import DestinationSettings
from middleware.store.tables import Delivery, DestinationHealth


def note_answer(health: DestinationHealth) -> None:
    """It answered, whatever it said: it is there."""
    health.failures, health.reason, health.trial = 0, "", ""
    health.down_since = health.probe_at = None


def note_failure(health: DestinationHealth, reason: str, now: datetime, settings: DestinationSettings) -> None:
    """It could not be reached, did not answer or said that it cannot just now."""
    health.failures, health.reason, health.trial = health.failures + 1, reason, ""
    if health.failures >= settings.down_after:
        health.down_since = health.down_since or now
        health.probe_at = now + timedelta(seconds=settings.probe_wait_s(health.failures))


def note_wish(health: DestinationHealth, wait_s: float, now: datetime) -> None:
    """It asked to be left alone for so long (HTTP `Retry-After`): it is obeyed rather than probed."""
    until = now + timedelta(seconds=wait_s)
    health.failures = 0
    health.hold_until = max(until, health.hold_until or until)


def reason_of(delivery: Delivery, healths: Mapping[str, DestinationHealth]) -> str:
    """Why a delivery is where it is: its own reason or, of one that waits and was never tried, its destination's."""
    health = healths.get(delivery.destination)
    if delivery.reason or delivery.state != "pending" or health is None or health.down_since is None:
        return delivery.reason
    return f"{delivery.destination} is down since {health.down_since:%Y-%m-%d %H:%M:%S} UTC ({health.reason})"
