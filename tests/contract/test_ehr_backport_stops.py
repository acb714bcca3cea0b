"""The running service while the EHR, its subscriptions or the service itself stop: what was ordered meanwhile is heard,
and what stopped comes back."""

import time
from pathlib import Path

import pytest

from tests.backport_server import BackportServer
from tests.backport_site import TOPICS, Site, hearing, until


def written(site: Site) -> list[str]:
    return [
        line for line in site.ehr.requests if line.startswith(("PUT /fhir/Subscription", "POST /fhir/Subscription"))
    ]


def test_ehr_that_is_down_when_the_service_starts_is_heard_later(tmp_path: Path) -> None:
    ehr = BackportServer(TOPICS)
    ehr.down = True
    with hearing(tmp_path, ehr) as site:
        assert site.service.answers()
        name = site.order()
        ehr.down = False
        until(lambda: site.is_applied(name))
        until(lambda: site.statuses() == ["active", "active"])
        other = site.order()
        until(lambda: site.is_applied(other))


def test_service_that_is_killed_again_and_again_misses_and_doubles_nothing(tmp_path: Path) -> None:
    with hearing(tmp_path) as site:
        names = []
        for _ in range(3):
            for _ in range(40):
                names.append(site.order())
                if len(names) % 40 == 37:
                    site.service.kill()
            site.start()
        for name in names:
            until(lambda name=name: site.is_applied(name))


def test_silent_subscription_is_asked_for_anew(tmp_path: Path) -> None:
    with hearing(tmp_path, heartbeat_s=1) as site:
        until(lambda: site.statuses() == ["active", "active"])
        before = len(written(site))
        until(lambda: len(written(site)) > before)
        until(lambda: site.statuses() == ["active", "active"])


def test_subscription_with_a_heartbeat_is_left_alone(tmp_path: Path) -> None:
    with hearing(tmp_path, heartbeat_s=1) as site:
        until(lambda: site.statuses() == ["active", "active"])
        before = len(written(site))
        for _ in range(14):
            site.ehr.heartbeat()
            time.sleep(0.3)
        assert len(written(site)) == before


def test_subscriptions_in_error_or_gone_come_back(tmp_path: Path) -> None:
    with hearing(tmp_path, check_s=0.3) as site:
        for status in ("error", "off"):
            until(lambda: site.statuses() == ["active", "active"])
            site.ehr.set_status(status)
        until(lambda: site.statuses() == ["active", "active"])
        for name in site.ehr.subscriptions():
            del site.ehr.resources[name]
        until(lambda: site.statuses() == ["active", "active"])
        name = site.order()
        until(lambda: site.is_applied(name))


def test_missed_events_show_in_the_servers_own_count(tmp_path: Path) -> None:
    with hearing(tmp_path, check_s=0.3) as site:
        until(lambda: site.statuses() == ["active", "active"])
        site.ehr.drops = 1
        name = site.order()
        until(lambda: site.is_applied(name))


@pytest.mark.parametrize("kind", ["Patient", "ImagingStudy"])
def test_what_the_ehr_refuses_stops_nothing_else(tmp_path: Path, kind: str) -> None:
    """No right to search patients, and no topic for studies; orders are heard at once all the same."""
    ehr = BackportServer(TOPICS)
    ehr.refused = {kind, f"Subscription {kind}"}
    with hearing(tmp_path, ehr, poll_s=600) as site:
        until(lambda: "active" in site.statuses())
        until(lambda: f'"step": "{kind}"' in site.service.log())
        name = site.order()
        until(lambda: site.is_applied(name))


def test_poll_finds_what_no_notification_tells(tmp_path: Path) -> None:
    with hearing(tmp_path, poll_s=0.3) as site:
        until(lambda: site.statuses() == ["active", "active"])
        site.ehr.drops = 1
        name = site.order()
        until(lambda: site.is_applied(name))
