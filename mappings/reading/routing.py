"""Routing rules over images, order and clinical context: compiled when loaded, evaluated with their reasons.

A rule is one expression of the Common Expression Language (https://cel.dev, cel-spec) that is true or false. It has
no loops, no assignments and no access to anything but the facts below. Examples:

    "MR" in study.modality && patient.age_years >= 40
    study.description.matches("(?i)prosta") || "PROSTATE" in study.body_part
    !labs.egfr.stated || labs.egfr >= 30.0
    order.priority in ["stat", "asap", "urgent"]
    patient.id.startsWith("QA-") || study.series_descriptions.exists(d, d.matches(r"(?i)\\bphantom\\b"))

The facts are listed in `study_to_facts.py`. A fact may be unknown. A comparison with an unknown fact is neither true
nor false: `unknown && false` is false, `unknown || true` is true, and a rule that hangs on it does not match and says
"not stated". `NAME.stated` is true or false; only of a fact that is not known yet (one that `evaluate` was not given at
all, since nobody was asked for it) it is unknown too.

The language: `&& || ! ?: == != < <= > >= in + - * /`, `size()`, `double(whole)`, of a text `.contains() .startsWith()
.endsWith()` and `.matches("RE2 pattern")` (found anywhere; `(?i)` ignores case; the pattern is written out, as `r"..."`
where it holds a backslash), of a list `.exists(x, ...) .all(x, ...) .exists_one(x, ...)`, not inside each other.
A `number` is compared with `4.0`, a `whole` with `4`.

Bounds, so that no rule can hold up a worker: 2,000 characters; 32 levels (parser); 10,000 iterations (runtime);
8 list tests and 8 patterns of 500 RE2 steps, which match in linear time; a study whose texts could cost more than 20
million steps times characters (about half a second) is undecided; nothing can build longer
texts or lists; a text fact is cut at 1,000 characters, a text in a list at 256, a list at 200 texts.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import re2  # type: ignore[import-untyped]
from cel_expr_python import cel  # type: ignore[import-untyped]

from mappings.model.rules import Clause, Rule, RuleError, Verdict
from mappings.reading.study_to_facts import FACTS, Facts, FactValue

LONGEST_RULE = 2000
MOST_TESTS = 8
LARGEST_PATTERN = 500
MOST_SEARCH_STEPS = 20_000_000
TOO_MANY_STEPS = "it takes too many steps"

_GROUPS = frozenset(name.partition(".")[0] for name in FACTS)
_QUANTIFIERS = frozenset({"all", "exists", "exists_one"})
_KINDS = {"list": cel.Type.List(cel.Type.STRING), "text": cel.Type.STRING, "number": cel.Type.DOUBLE}
_OPERATORS = "_&&_ _||_ !_ _?_:_ _==_ _!=_ _<_ _<=_ _>_ _>=_ @in _-_ _*_ _/_ -_ @not_strictly_false"
_FUNCTIONS = "size contains startsWith endsWith double"


# --- compiling -----------------------------------------------------------------------------------------------


def compile_rule(expression: str) -> Rule:
    """The checked rule. Raises RuleError with line, column and a sentence: unknown names, wrong types, a result
    that is not true or false, bad or oversized patterns, anything outside the documented language and bounds."""
    if len(expression) > LONGEST_RULE:
        raise RuleError(f"the rule is {len(expression)} characters long; {LONGEST_RULE} are allowed")
    if re.search("[\ud800-\udfff]", expression):
        raise RuleError("the rule holds a character that is none")
    tokens = _tokens(expression)
    steps = _check_tokens(tokens, expression)
    program = _compile(expression)
    kind = program.return_type().name()
    if kind != "BOOL":
        raise RuleError(f"the rule gives a {kind.lower()}; it must give true or false, so compare it with something")
    return Rule(expression, _names(tokens, expression), _clauses(tokens, expression), steps, program)


def _compile(expression: str) -> Any:
    try:
        return _environment().compile(expression)
    except RuntimeError as error:
        raise _readable(str(error)) from None


@cache
def _environment() -> Any:
    """The declared names, and of CEL's standard library only what the docstring lists: a rule that cannot join
    texts or lists cannot grow them either."""
    functions = "".join(f'    - name: "{name}"\n' for name in f"{_OPERATORS} {_FUNCTIONS}".split())
    allowed = (
        f"stdlib:\n  include_macros: [{', '.join(sorted(_QUANTIFIERS))}]\n  include_functions:\n{functions}"
        '    - name: "_+_"\n      overloads: [{id: add_int64}, {id: add_double}]\n'
        '    - name: "matches"\n      overloads: [{id: matches_string}]\n'
    )
    variables = {name: _KINDS.get(fact.kind, cel.Type.INT) for name, fact in FACTS.items()}
    stated = {f"{name}.stated": cel.Type.BOOL for name in FACTS}
    return cel.NewEnv(config=cel.NewEnvConfigFromYaml(allowed), variables={**variables, **stated})


def _pattern_steps(pattern: str) -> int:
    """How large a program RE2 makes of the pattern; ValueError where it is no pattern or the program is too large."""
    options = re2.Options()
    options.log_errors = False
    options.max_mem = 1 << 20
    try:
        steps = int(re2.compile(pattern, options).programsize)
    except re2.error as error:
        reason = error.args[0].decode() if isinstance(error.args[0], bytes) else str(error)
        raise ValueError(f"not an RE2 pattern: {reason}") from None
    if steps > LARGEST_PATTERN:
        raise ValueError(f"the pattern compiles to {steps} steps; {LARGEST_PATTERN} are allowed")
    return steps


_HINTS = (
    ("undeclared reference to 'has'", "; write NAME.stated"),
    ("undeclared reference to 'matches'", '; write TEXT.matches("pattern")'),
    ("'(double, int)'", "; write the number with a fraction, like 4.0"),
    ("'(int, double)'", "; write the number without a fraction, like 4"),
    ("null_type", "; write NAME.stated to ask whether a fact is known"),
    ("token recognition error at: '= '", "; write == to compare"),
)


def _readable(message: str) -> RuleError:
    """The compiler's first complaint as a RuleError, with what to write instead where that is known."""
    found = re.search(r"ERROR: <input>:(-?\d+):(-?\d+): ([^\n]*)", message)
    if found is None:
        if "recursion" in message:
            return RuleError("the rule is nested too deeply")
        return RuleError(re.sub(r"^[A-Z_]+: | \[[A-Z_]+\]$", "", message.splitlines()[0]))
    line, column, text = int(found[1]), int(found[2]), found[3]
    hint = next((hint for part, hint in _HINTS if part in text), "")
    text = re.sub(r" \(in container ''\)| \[[A-Z_]+\]$", "", text).split(" expecting {")[0]
    undeclared = re.fullmatch(r"undeclared reference to '(.*)'", text)
    if undeclared:
        text = f"there is no '{undeclared[1]}' here{hint or _known_names(undeclared[1])}"
        hint = ""
    return RuleError(text + hint, max(line, 1), max(column, 1))


def _known_names(wrong: str) -> str:
    close = difflib.get_close_matches(wrong, FACTS, n=2, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    group = wrong.partition(".")[0]
    names = [n for n in FACTS if n.startswith(f"{group}.")] or [f"{g}.…" for g in sorted(_GROUPS)]
    return f"; there are {', '.join(names)}"


# --- the words of a rule -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Token:
    """One word of an expression: what it is, its text, and where it starts."""

    kind: str
    text: str
    start: int


_TOKEN = re.compile(
    r"""(?P<skip>\s+|//[^\n]*)
      | (?P<string>[rR]"[^"\n]*"|[rR]'[^'\n]*'|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')
      | (?P<name>[A-Za-z_]\w*)
      | (?P<number>\d[\w.]*|\.\d[\w]*)
      | (?P<mark>&&|\|\||.)""",
    re.VERBOSE | re.DOTALL,
)


def _tokens(expression: str) -> list[Token]:
    found = (Token(str(m.lastgroup), m.group(), m.start()) for m in _TOKEN.finditer(expression))
    return [token for token in found if token.kind != "skip"]


def _fail(expression: str, token: Token, message: str) -> RuleError:
    before = expression[: token.start]
    return RuleError(message, before.count("\n") + 1, token.start - (before.rfind("\n") + 1) + 1)


def _check_tokens(tokens: Sequence[Token], expression: str) -> tuple[int, int]:
    """What the type checker cannot say: facts by name, literal patterns, bounded list tests. Returns the steps of the
    patterns outside and inside list tests."""
    steps = [0, 0]
    padded = [*tokens, Token("end", "", len(expression))]
    open_marks: list[bool] = []
    for index, token in enumerate(tokens):
        after = padded[index + 1]
        if token.text in ("{", "}", "`") and token.kind == "mark":
            raise _fail(expression, token, f"'{token.text}' is not used in rules")
        if token.kind == "string" and after.kind == "string":
            raise _fail(expression, token, "a text ends where another one begins; use single or double quotes once")
        if token.text == "(":
            opens_test = _is_method(tokens, index - 1, _QUANTIFIERS)
            if opens_test and any(open_marks):
                raise _fail(expression, tokens[index - 1], "a list test may not stand inside another one")
            open_marks.append(opens_test)
            if _is_method(tokens, index - 1, {"matches"}):
                steps[any(open_marks)] += _check_pattern(padded[index + 1 : index + 3], expression)
        elif token.text == ")" and open_marks:
            open_marks.pop()
        if token.kind == "name":
            _check_name(tokens, index, expression)
    _check_counts(tokens, expression)
    return steps[False], steps[True]


def _is_method(tokens: Sequence[Token], index: int, names: Iterable[str]) -> bool:
    return index > 0 and tokens[index].text in names and tokens[index - 1].text == "."


def _check_counts(tokens: Sequence[Token], expression: str) -> None:
    for names, what in ((_QUANTIFIERS, "list tests"), ({"matches"}, "patterns")):
        used = [i for i in range(len(tokens)) if _is_method(tokens, i, names)]
        if len(used) > MOST_TESTS:
            raise _fail(expression, tokens[used[MOST_TESTS]], f"more than {MOST_TESTS} {what} in one rule")


def _check_pattern(arguments: Sequence[Token], expression: str) -> int:
    if [a.kind for a in arguments] != ["string", "mark"] or arguments[1].text != ")":
        raise _fail(expression, arguments[0], 'matches takes one pattern, written out: .matches("pattern")')
    try:
        pattern = str(_environment().compile(arguments[0].text).eval(data={}).value())
        if "\b" in pattern:
            raise ValueError('"\\b" is a backspace in a plain text; write the pattern as r"..."')
        return _pattern_steps(pattern)
    except RuntimeError as error:
        raise _fail(expression, arguments[0], _readable(str(error)).message) from None
    except ValueError as error:
        raise _fail(expression, arguments[0], str(error)) from None


def _path(tokens: Sequence[Token], index: int) -> list[str]:
    """The dotted name that starts at `index`, without the method that may be called on it."""
    path = [tokens[index].text]
    while index + 2 < len(tokens) and tokens[index + 1].text == "." and tokens[index + 2].kind == "name":
        path.append(tokens[index + 2].text)
        index += 2
    called = index + 1 < len(tokens) and tokens[index + 1].text == "("
    return path[:-1] if called else path


def _check_name(tokens: Sequence[Token], index: int, expression: str) -> None:
    if index > 0 and tokens[index - 1].text == ".":
        if index == 1 or (tokens[index - 2].kind == "mark" and tokens[index - 2].text not in ")]"):
            raise _fail(expression, tokens[index - 1], "a name does not begin with a dot")
        return
    path = _path(tokens, index)
    if not path or path[0] not in _GROUPS:
        return
    if ".".join(path[:2]) not in FACTS or path[2:] not in ([], ["stated"]):
        wrong = ".".join(path)
        raise _fail(expression, tokens[index], f"there is no fact '{wrong}'{_known_names(wrong)}")


def _names(tokens: Sequence[Token], expression: str, start: int = 0, end: int | None = None) -> tuple[str, ...]:
    """The facts that the words from `start` to before `end` name, in order, each once."""
    paths = (
        ".".join(_path(tokens, i)[:2])
        for i, token in enumerate(tokens)
        if token.kind == "name" and start <= token.start < (len(expression) if end is None else end)
    )
    return tuple(dict.fromkeys(path for path in paths if path in FACTS))


def _clauses(tokens: Sequence[Token], expression: str) -> tuple[Clause, ...]:
    """The parts joined by `&&` at the top; the rule as a whole where `||` or `?` stand there too."""
    depth, cuts, whole = 0, [0], False
    for token in tokens:
        depth += (token.text in "([") - (token.text in ")]") if token.kind == "mark" else 0
        whole = whole or (depth == 0 and token.text in ("||", "?"))
        if depth == 0 and token.text == "&&":
            cuts += [token.start, token.start + 2]
    cuts = [0, len(expression)] if whole else [*cuts, len(expression)]
    parts = zip(cuts[::2], cuts[1::2], strict=True)
    return tuple(
        Clause(expression[a:b].strip(), _names(tokens, expression, a, b), _compile(expression[a:b])) for a, b in parts
    )


# --- evaluating ----------------------------------------------------------------------------------------------

_UNKNOWN = re.compile(r'No value with name "([^"]+)"')
SHOWN_ITEMS, SHOWN_CHARACTERS = 6, 80
NOT_KNOWN_YET = "not known yet"


def evaluate(rule: Rule, facts: Facts) -> Verdict:
    """What `rule` says of a study with these `facts` (`facts_of`), with the values that decided. Never raises for
    what a study holds: a rule that cannot be computed is undecided and does not match."""
    looked_at = {name: show_fact(name, facts[name]) if name in facts else NOT_KNOWN_YET for name in rule.names}
    if _search_cost(rule, facts) > MOST_SEARCH_STEPS:
        return Verdict(False, looked_at, f"cannot be decided: {TOO_MANY_STEPS}", False)
    outcome = _run(rule.program, rule.names, facts)
    if outcome is True:
        return Verdict(True, looked_at, f"holds: {_say(rule.names, looked_at)}" if rule.names else "holds always")
    parts = [(clause, _run(clause.program, clause.names, facts)) for clause in rule.clauses]
    if outcome is False:
        failed = (f"`{c.text}` does not hold ({_say(c.names, looked_at)})" for c, came in parts if came is False)
        return Verdict(False, looked_at, "; ".join(failed))
    open_parts = [(clause, came) for clause, came in parts if isinstance(came, str)]
    missing = tuple(dict.fromkeys(n for c, _ in open_parts for n in c.names if n in facts and facts[n] is None))
    why = "; ".join(f"`{c.text}` cannot be decided: {_why(c, came, facts)}" for c, came in open_parts)
    return Verdict(False, looked_at, why or f"cannot be decided: {outcome}", False, missing)


COMPILING = 20
"""The runtime compiles a pattern for each text anew; this takes as long as matching so many characters."""


def _search_cost(rule: Rule, facts: Facts) -> int:
    """The most that the rule's patterns can take, in RE2's terms: steps times characters, over every text."""
    values = [facts.get(name) for name in rule.names]
    lists = [value for value in values if isinstance(value, tuple)]
    texts = [value for value in values if isinstance(value, str)] + [text for some in lists for text in some]
    longest = max((len(text) for text in [*texts, rule.expression]), default=0)
    rounds = max([len(some) for some in lists] + [rule.expression.count(",") + 1])
    outside, inside = rule.pattern_steps
    return (outside + inside * rounds) * (longest + COMPILING)


def show_fact(name: str, value: FactValue) -> str:
    """The value as people read it, with its unit; what identifies the patient is not shown."""
    fact = FACTS[name]
    if value is None:
        return "not stated"
    if fact.private:
        return "stated, not shown"
    if isinstance(value, tuple):
        more = f" and {len(value) - SHOWN_ITEMS} more" if len(value) > SHOWN_ITEMS else ""
        return ", ".join(_cut(v) for v in value[:SHOWN_ITEMS]) + more
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{_cut(text)} {fact.unit}".rstrip()


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…"


def _say(names: Iterable[str], looked_at: Mapping[str, str]) -> str:
    """The facts in words. A clause without any is a constant."""
    return "; ".join(f"{name} is {looked_at[name]}" for name in names) or "it looks at nothing"


def _why(clause: Clause, came: str, facts: Facts) -> str:
    lacking = (
        ([name for name in clause.names if name not in facts], NOT_KNOWN_YET),
        ([name for name in clause.names if name in facts and facts[name] is None], "not stated"),
    )
    told = "; ".join(f"{', '.join(names)} {what}" for names, what in lacking if names)
    return told if _UNKNOWN.search(came) and told else came


def _run(program: Any, names: Iterable[str], facts: Facts) -> bool | str:
    """True, false, or why it is neither."""
    bound: dict[str, Any] = {}
    for name in names:
        value = facts.get(name)
        if name in facts:
            bound[f"{name}.stated"] = value is not None
        if value is not None:
            bound[name] = _bind(FACTS[name].kind, value)
    try:
        result = program.eval(data=bound)
    except RuntimeError as error:
        return TOO_MANY_STEPS if "budget" in str(error) else str(error)
    value = result.value()
    return value if isinstance(value, bool) else re.sub(r"^[A-Z_]+: ", "", str(value))


def _bind(kind: str, value: FactValue) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return float(value) if kind == "number" and isinstance(value, int | float) else value
