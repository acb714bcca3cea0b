"""Which protocol reads a study, decided in one place: by the reading itself, by `explain` and by `dry-run`.

A study is read by the first protocol that lets it in, in the order of the files: every condition of `match` and every
rule of `when` holds, and no rule of `set_aside` does. Its series must then be able to play the protocol's roles.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from mappings.model.context import ClinicalContext
from mappings.model.findings import RoleChoice
from mappings.model.protocol import Protocol
from mappings.model.rules import Rule, RuleText, Verdict
from mappings.model.study import Study
from mappings.reading.match_to_verdicts import describe_condition, judge_match
from mappings.reading.routing import evaluate
from mappings.reading.series_to_roles import choose_series
from mappings.reading.study_to_facts import Facts, facts_of, facts_of_images
from middleware.errors import Stopped
from middleware.intake.images import check_roles
from middleware.intake.protocols import LoadedProtocol

Part = Literal["match", "when", "set_aside"]
DecidedState = Literal["read", "open", "unmatched", "unusable"]


@dataclass(frozen=True)
class Check:
    """One condition of `match` or one rule, in the file's words, and what it said. `lets_in` is None where it hangs on
    context that was not asked for yet. `values` has every value it looked at, as shown to people."""

    part: Part
    text: str
    lets_in: bool | None
    values: Mapping[str, str]
    reason: str


@dataclass(frozen=True)
class Considered:
    """One protocol before a study. `roles` are chosen where no check refuses the study; `faults` say why the series of
    a required role cannot be used."""

    protocol: str
    version: str
    sha256: str
    checks: tuple[Check, ...]
    roles: tuple[RoleChoice, ...] = ()
    faults: tuple[str, ...] = ()

    @property
    def refusals(self) -> tuple[Check, ...]:
        """The checks that keep the study out: conditions of `match` or, where all of them hold, rules."""
        refusing = tuple(check for check in self.checks if check.lets_in is False)
        return tuple(check for check in refusing if check.part == "match") or refusing

    @property
    def is_open(self) -> bool:
        """Whether a check waits for the context."""
        return any(check.lets_in is None for check in self.checks)


@dataclass(frozen=True)
class Decided:
    """What becomes of a study. `state`: read; open (only the context can tell, and it was not asked for yet); unmatched
    (no protocol lets it in); unusable (the series that its protocol needs are not there, or not safe to use).
    `protocol` is the one that reads it or, as far as is known, would; empty where unmatched."""

    state: DecidedState
    protocol: str
    reasons: tuple[str, ...]
    considered: tuple[Considered, ...]
    decided_at: datetime
    knew_context: bool

    def find(self, protocol: str) -> Considered | None:
        """The protocol of this name before the study; None where it was not among those considered."""
        return next((each for each in self.considered if each.protocol == protocol), None)


def decide(
    study: Study, context: ClinicalContext | None, protocols: Mapping[str, LoadedProtocol], now: datetime
) -> Decided:
    """Decide which of `protocols`, in their order, reads `study`. `context` None: the EHR was not asked yet, so rules
    that hang on it stay open. `now` (aware) is when the reading began. Never raises for what a study holds."""
    facts = facts_of_images(study, now) if context is None else facts_of(study, None, context, now)
    considered = tuple(_consider(study, facts, loaded) for loaded in protocols.values())
    state, protocol, reasons = _conclude(considered)
    return Decided(state, protocol, reasons, considered, now, context is not None)


def _conclude(considered: Sequence[Considered]) -> tuple[DecidedState, str, tuple[str, ...]]:
    candidates = [each for each in considered if not each.refusals]
    if not candidates:
        return "unmatched", "", _refusals(considered)
    first = candidates[0]
    # While the first is open, another candidate may still be the one: only if none can be read is it over.
    if first.faults and (not first.is_open or all(each.faults for each in candidates)):
        return "unusable", first.protocol, first.faults
    return "open" if first.is_open else "read", first.protocol, ()


def _refusals(considered: Sequence[Considered]) -> tuple[str, ...]:
    """Why each protocol refuses; where the `match` of some holds, only those: they are the ones that were meant."""
    meant = [each for each in considered if each.refusals[0].part != "match"]
    return tuple(f"{each.protocol}: {'; '.join(c.reason for c in each.refusals)}" for each in meant or considered)


def _consider(study: Study, facts: Facts, loaded: LoadedProtocol) -> Considered:
    protocol = loaded.protocol
    checks = (
        *(
            Check("match", describe_condition(condition), verdict.matched, verdict.values_looked_at, verdict.reason)
            for condition, verdict in judge_match(study, protocol)
        ),
        *_check_rules("when", loaded.when, facts, _judge_when),
        *_check_rules("set_aside", loaded.set_aside, facts, _judge_set_aside),
    )
    roles = () if any(check.lets_in is False for check in checks) else choose_series(study, protocol)
    faults = _find_faults(study, protocol, roles) if roles else ()
    return Considered(protocol.name, protocol.version, loaded.digest, checks, roles, faults)


def _check_rules(
    part: Part,
    rules: Sequence[tuple[RuleText, Rule]],
    facts: Facts,
    judge: Callable[[RuleText, Verdict], tuple[bool, str]],
) -> Iterator[Check]:
    for text, rule in rules:
        verdict = evaluate(rule, facts)
        lets_in: bool | None
        lets_in, reason = judge(text, verdict)
        if not verdict.decided and any(name not in facts for name in rule.names):
            lets_in, reason = None, verdict.reason
        yield Check(part, text.expression, lets_in, verdict.values_looked_at, reason)


def _judge_when(text: RuleText, verdict: Verdict) -> tuple[bool, str]:
    said = verdict.reason if verdict.matched else f"{text.say or 'a rule does not hold'}: {verdict.reason}"
    return verdict.matched, said


def _judge_set_aside(text: RuleText, verdict: Verdict) -> tuple[bool, str]:
    looked_at = ", ".join(f"{name} is {value}" for name, value in verdict.values_looked_at.items())
    said = f"set aside: {text.say or text.expression} ({looked_at})" if verdict.matched else verdict.reason
    return not verdict.matched, said


def _find_faults(study: Study, protocol: Protocol, roles: Sequence[RoleChoice]) -> tuple[str, ...]:
    try:
        check_roles(study, protocol, roles)
    except Stopped as stop:
        return stop.reasons
    return ()
