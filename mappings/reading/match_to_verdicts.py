"""What each `match` condition of a protocol says of a study, in words and with the values it looked at."""

from collections.abc import Iterator

from mappings.model.protocol import Condition, Protocol, Scalar
from mappings.model.rules import Verdict
from mappings.model.study import Study
from mappings.reading.routing import SHOWN_CHARACTERS, SHOWN_ITEMS
from mappings.reading.series_to_roles import STUDY_ATTRIBUTES, Value, failed

_COMPARISONS = ("any_of", "none_of", "at_least", "at_most", "matches", "not_matches")


def judge_match(study: Study, protocol: Protocol) -> tuple[tuple[Condition, Verdict], ...]:
    """Every condition of `match` with its verdict; all of them hold exactly where `match_protocol` has no reason."""
    return tuple((condition, _judge(study, condition)) for condition in protocol.match)


def _judge(study: Study, condition: Condition) -> Verdict:
    reason = failed(condition, lambda name: STUDY_ATTRIBUTES[name](study))
    looked_at = {name: _show(STUDY_ATTRIBUTES[name](study)) for name in _attributes(condition)}
    said = ", ".join(f"{name} is {value}" for name, value in looked_at.items())
    return Verdict(reason is None, looked_at, reason or f"holds: {said}")


def _attributes(condition: Condition) -> Iterator[str]:
    if condition.any is None:
        yield condition.attribute
    for each in condition.any or ():
        yield from _attributes(each)


def describe_condition(condition: Condition) -> str:
    """The condition on one line, in the words of the protocol file."""
    if condition.any is not None:
        return "any: " + " | ".join(describe_condition(each) for each in condition.any)
    compared = ((name, getattr(condition, name)) for name in _COMPARISONS)
    parts = [f"{name} {_words(value)}" for name, value in compared if value is not None]
    parts += ["missing pass"] if condition.missing == "pass" else []
    return f"{condition.attribute} {', '.join(parts)}"


def _words(value: Scalar | tuple[Scalar, ...]) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def _show(value: Value) -> str:
    shown = ", ".join(_cut(f"{v:g}" if isinstance(v, float) else str(v)) for v in value[:SHOWN_ITEMS])
    more = f" and {len(value) - SHOWN_ITEMS} more" if len(value) > SHOWN_ITEMS else ""
    return f"{shown}{more}" or "not stated"


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…"
