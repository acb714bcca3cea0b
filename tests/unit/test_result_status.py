"""Which status may follow which: a total order, with a reason where it may not."""

from itertools import product

import pytest

from mappings.model.findings import Status
from mappings.rules.result_status import RANKS, ReportStatus, find_refusal, find_report_refusal, may_follow

STATUSES: tuple[Status, ...] = ("preliminary", "final", "amended", "corrected", "entered-in-error")
ALLOWED = {
    "preliminary": {"preliminary", "final", "entered-in-error"},
    "final": {"final", "amended", "corrected", "entered-in-error"},
    "amended": {"amended", "corrected", "entered-in-error"},
    "corrected": {"amended", "corrected", "entered-in-error"},
    "entered-in-error": set[str](),
}


@pytest.mark.parametrize(("old", "new"), [*product(STATUSES, STATUSES)])
def test_each_pair_is_allowed_or_refused_with_a_sentence(old: Status, new: Status) -> None:
    assert may_follow(old, new) == (new in ALLOWED[old])
    why = find_refusal(old, new)
    assert bool(why) != may_follow(old, new)
    assert not why or why.endswith(".")


@pytest.mark.parametrize(("old", "new"), [*product(STATUSES, STATUSES)])
def test_what_may_follow_never_ranks_lower(old: Status, new: Status) -> None:
    assert not may_follow(old, new) or RANKS[new] >= RANKS[old]


@pytest.mark.parametrize(
    ("report", "new", "refused"),
    [
        ("F", "preliminary", True),
        ("C", "preliminary", True),
        ("P", "preliminary", False),
        ("", "preliminary", False),
        ("F", "final", False),
        ("F", "entered-in-error", False),
    ],
)
def test_a_preliminary_result_does_not_follow_the_radiologists_final_report(
    report: ReportStatus, new: Status, refused: bool
) -> None:
    assert bool(find_report_refusal(report, new)) == refused
