"""Two decisions about one study side by side: whether they differ, and on which rule and value."""

from collections.abc import Iterator
from itertools import chain

from middleware.intake.deciding import Check, Considered, Decided

COMES_FIRST = "the order of the protocols differs"


def compare(then: Decided, now: Decided) -> tuple[str, ...]:
    """What makes `now` another decision than `then`, in sentences; empty where the study is treated alike. A decision
    that was left open counts as one for the protocol that waited. `then` without protocols (its verdicts were not
    kept) is told by its reasons."""
    if _outcome(then) == _outcome(now):
        return tuple(_other_series(then.find(now.protocol), now.find(now.protocol)))
    names = dict.fromkeys(name for name in (then.protocol, now.protocol) if name)
    told = chain.from_iterable(_changes(name, then, now) for name in names)
    return tuple(told) or (COMES_FIRST,)


def _outcome(decided: Decided) -> tuple[str, str]:
    return "read" if decided.state == "open" else decided.state, decided.protocol


def _changes(name: str, then: Decided, now: Decided) -> Iterator[str]:
    before, after = then.find(name), now.find(name)
    if after is None:
        yield f"{name} is not in use now"
    elif before is None and then.considered:
        yield f"{name} was not tried then"
    else:
        yield from _changed_checks(name, before, after)
        yield from (f"then: {reason}" for reason in then.reasons if before is None)


def _changed_checks(name: str, before: Considered | None, after: Considered) -> Iterator[str]:
    refused = before.refusals if before else ()
    if after.refusals != refused:
        yield from (f"{name}, {check.part}, then: {check.reason}" for check in refused)
        yield from (f"{name}, {check.part}, now: {check.reason}" for check in after.refusals)
        yield from (f"{name}, {check.part}, now: `{check.text}` {check.reason}" for check in _letting_in(before, after))
    faults = before.faults if before else ()
    if faults != after.faults:
        yield from (f"{name}, roles, then: {fault}" for fault in faults)
        yield from (f"{name}, roles, now: {fault}" for fault in after.faults)


def _letting_in(before: Considered | None, after: Considered) -> Iterator[Check]:
    """Checks that now let in what others of their part kept out."""
    refused = before.refusals if before else ()
    parts, known = {check.part for check in refused}, {check.text for check in before.checks} if before else set()
    return (c for c in after.checks if c.part in parts and c.text not in known and c.lets_in)


def _other_series(before: Considered | None, after: Considered | None) -> Iterator[str]:
    if before is None or after is None:
        return
    series = {choice.role: choice for choice in before.roles}
    for choice in after.roles:
        was = series.get(choice.role)
        if (was.series_instance_uid if was else None) != choice.series_instance_uid:
            told = was.series_label if was and was.series_instance_uid else "none"
            yield f"role {choice.role}: series {told} then, {choice.series_label or 'none'} now"
