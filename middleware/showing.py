"""Decisions on a screen: every check of every protocol, with the values it looked at, and the series of each role."""

import difflib
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from mappings.model.findings import RoleChoice
from middleware.intake.deciding import Check, Considered, Decided

MOST_LINES = 20
MOST_CHARACTERS = 500
_MARKS = {True: "[green]✓[/]", False: "[red]✗[/]", None: "[yellow]?[/]"}


def print_indented(text: str, by: int, screen: Console) -> None:
    """Print text that stays indented where it is too long for one line."""
    screen.print(Padding(text, (0, 0, 0, by)))


def print_considered(considered: Considered, decided: Decided, screen: Console) -> None:
    """Print what one protocol says of the study, check by check."""
    name = f"protocol [bold]{escape(considered.protocol)}[/] version {escape(considered.version)}"
    screen.print(f"  {name} {_verdict(considered, decided)}", soft_wrap=True)
    checks = Table.grid(padding=(0, 2, 0, 0))
    checks.add_column()
    checks.add_column(style="dim")
    checks.add_column(ratio=1)
    checks.add_column(ratio=1)
    for check in considered.checks:
        checks.add_row(_MARKS[check.lets_in], check.part, escape(check.text), _looked_at(check))
    screen.print(Padding(checks, (0, 0, 0, 4)))
    for fault in considered.faults:
        print_indented(f"[red]✗[/]  [dim]roles[/]  {escape(fault)}", 4, screen)


def _verdict(considered: Considered, decided: Decided) -> str:
    if considered.refusals:
        return "[yellow]does not read it[/]"
    if considered.faults:
        return "[red]applies, but its series cannot be used[/]"
    if considered.is_open:
        return "[yellow]may read it: the rules marked ? need the EHR's context, which was not asked for[/]"
    if considered.protocol == decided.protocol:
        return "[green]reads it[/]"
    return f"[dim]would read it, but {escape(decided.protocol)} comes first[/]"


def _looked_at(check: Check) -> str:
    """The values and, where they keep the study out, the reason, without the rule that stands beside it."""
    values = [escape(f"{name} is {value}") for name, value in check.values.items()]
    reason = check.reason.replace(f"`{check.text}` ", "")
    said = [f"[red]{escape(reason)}[/]"] if check.lets_in is False and reason not in values else []
    return "\n".join([*values, *said])


def print_roles(roles: Sequence[RoleChoice], screen: Console) -> None:
    """Print each role with the series that plays it, and every reason."""
    for choice in roles:
        taken = f"[green]{escape(choice.series_label)}[/]" if choice.series_instance_uid else "[yellow]no series[/]"
        need = "" if choice.required else " (optional)"
        screen.print(f"  role [bold]{choice.role}[/]{need}, {choice.title}: {taken}")
        for reason in choice.reasons:
            print_indented(f"[dim]{escape(reason)}[/]", 4, screen)


def issue_lines(answer: object) -> list[str]:
    """What a FHIR server said, issue by issue, in its own words; of any other answer the beginning."""
    if not isinstance(answer, dict):
        return [" ".join(answer.split())[:MOST_CHARACTERS]] if isinstance(answer, str) else []
    entries = answer.get("entry")
    listed = [each for each in entries if isinstance(each, dict)] if isinstance(entries, list) else []
    outcomes = [answer, *((each.get("response") or {}).get("outcome") for each in listed)]
    issues = [issue for each in outcomes if isinstance(each, dict) for issue in each.get("issue") or ()]
    lines = [_issue_line(issue) for issue in issues if isinstance(issue, dict)]
    rest = len(lines) - MOST_LINES
    return [*lines[:MOST_LINES], *([f"and {rest} more"] if rest > 0 else [])]


def _issue_line(issue: dict[str, Any]) -> str:
    details = issue.get("details")
    text = issue.get("diagnostics") or (details.get("text") if isinstance(details, dict) else "") or ""
    places = issue.get("expression") or issue.get("location") or []
    where = f" at {', '.join(map(str, places))}" if isinstance(places, list) and places else ""
    told = " ".join(f"{issue.get('severity', '')} {issue.get('code', '')}: {text}".split())
    return f"{told[:MOST_CHARACTERS]}{where[:MOST_CHARACTERS]}"


def diff_lines(then: str, now: str) -> list[str]:
    """The lines of a file that changed, with their numbers: `-` as it was, `+` as it is; the first ones, and how many
    more there are."""
    before, after = then.splitlines(), now.splitlines()
    lines: list[str] = []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if tag != "equal":
            lines += [f"- line {n + 1}: {before[n].strip()}" for n in range(a, b)]
            lines += [f"+ line {n + 1}: {after[n].strip()}" for n in range(c, d)]
    rest = len(lines) - MOST_LINES
    return [*lines[:MOST_LINES], *([f"and {rest} more lines"] if rest > 0 else [])]
