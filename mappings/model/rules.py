"""Routing rules: what a protocol's `when:` and `set_aside:` say, and what came of them for one study."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RuleText:
    """One rule as the protocol file has it. `say` is the sentence that people read: for `when:` why a study
    is not read where the rule does not hold, for `set_aside:` why it is set aside where the rule holds."""

    expression: str
    say: str = ""


class RuleError(ValueError):
    """A rule that cannot be loaded. `line` and `column` count from 1 inside the expression; the message says
    what is wrong and what to write instead."""

    def __init__(self, message: str, line: int = 1, column: int = 1) -> None:
        super().__init__(f"line {line}, column {column}: {message}")
        self.message = message
        self.line = line
        self.column = column


@dataclass(frozen=True)
class Clause:
    """One part of a rule that is joined to the others by `&&`, and the facts it looks at, in order."""

    text: str
    names: tuple[str, ...]
    program: Any = field(compare=False, repr=False)


@dataclass(frozen=True)
class Rule:
    """A rule that was checked and compiled. All `clauses` hold exactly where the rule holds. `pattern_steps` is how
    large its patterns are, outside and inside list tests."""

    expression: str
    names: tuple[str, ...]
    clauses: tuple[Clause, ...]
    pattern_steps: tuple[int, int]
    program: Any = field(compare=False, repr=False)


@dataclass(frozen=True)
class Verdict:
    """What a rule said of one study.

    `matched` is true only where the rule was decided and holds. `decided` is false where it hung on facts that
    are not stated (`not_stated` names them) or could not be computed. `values_looked_at` has every fact that
    the rule names, in words ("6.5 ng/mL", "not stated"); facts that identify the patient are never shown.
    """

    matched: bool
    values_looked_at: Mapping[str, str]
    reason: str
    decided: bool = True
    not_stated: tuple[str, ...] = ()
