"""`protocols dry-run`: what protocols would make of a study in a folder, or of the studies of the last days.

Only what rules decide is replayed: `match`, roles, `when` and `set_aside`. Nothing is fetched, sent or changed.
"""

import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from middleware.bootstrap import open_folder
from middleware.errors import SettingsError, Stopped
from middleware.intake.comparing import compare
from middleware.intake.deciding import Decided, DecidedState, decide
from middleware.intake.images import read_study
from middleware.intake.inbox import run_started_at
from middleware.intake.protocols import LoadedProtocol
from middleware.kept import Kept, open_kept
from middleware.settings import Settings
from middleware.showing import print_considered, print_roles
from middleware.store.tables import StudyJob

Protocols = Mapping[str, LoadedProtocol]
NOTHING_KEPT = 2
_EXIT_CODES = {"read": 0, "open": 0, "unmatched": 3, "unusable": 4}


# A folder


async def dry_run(source: Path, protocols: Protocols, screen: Console) -> int:
    """Print what reading the study in `source` would choose; 0, or 3 or 4 as `process` would end."""
    if not source.is_dir():
        raise SettingsError(f"folder {source} is not there")
    folder = open_folder(source)
    studies = await folder.search_studies({})
    if len(studies) != 1:
        screen.print(f"[red]{escape(str(source))} holds {len(studies)} studies, not one[/]")
        return 4
    spool = Path(tempfile.mkdtemp(prefix="wetread-dry-run-"))
    try:
        await folder.fetch_study(str(studies[0]["0020000D"]["Value"][0]), spool / "images")
        decided = decide(read_study(spool / "images"), None, protocols, datetime.now(UTC))
    except Stopped as stop:
        for reason in stop.reasons:
            screen.print(f"  [red]refused:[/] {escape(reason)}", soft_wrap=True)
        return 4
    finally:
        shutil.rmtree(spool, ignore_errors=True)
    _print_decided(decided, screen)
    return _EXIT_CODES[decided.state]


def _print_decided(decided: Decided, screen: Console) -> None:
    for considered in decided.considered:
        print_considered(considered, decided, screen)
        print_roles(considered.roles, screen)
    if decided.state == "read":
        screen.print(f"[green]This study would be read by {escape(decided.protocol)}.[/]")
    elif decided.state == "open":
        screen.print("[green]This study would be read,[/] if the rules that need the EHR's context let it in.")
    else:
        screen.print(f"[red]This study would not be read: {decided.state}.[/]")


# The last days


@dataclass(frozen=True)
class Replayed:
    """One study, as it was decided then and as it would be now; what makes the difference."""

    job: StudyJob
    then: Decided
    now: Decided
    differences: tuple[str, ...]

    @property
    def outcome(self) -> str:
        """differs, same, or open (the context was not gathered then, and a rule needs it)."""
        return "open" if self.now.state == "open" else "differs" if self.differences else "same"


def replay_past(settings: Settings, days: float, protocols: Protocols, screen: Console, *, show_all: bool) -> int:
    """Print what `protocols` would make of every study heard of in the last days; 0, or 2 where none is kept."""
    with open_kept(settings) as kept:
        jobs = kept.store.jobs_heard_since(datetime.now(UTC) - timedelta(days=days)) if kept else []
        replayed = [one for job in jobs if kept and (one := _replay(job, kept, protocols))]
    if not replayed:
        screen.print(f"Nothing to replay: of {_last(days)} no study's images are kept.")
        return NOTHING_KEPT
    _print_summary(replayed, len(jobs), days, screen)
    for each in replayed:
        if show_all or each.outcome != "same":
            _print_replayed(each, screen)
    return 0


def _last(days: float) -> str:
    return "the last day" if days == 1 else f"the last {days:g} days"


def _replay(job: StudyJob, kept: Kept, protocols: Protocols) -> Replayed | None:
    study = kept.study(job)
    if study is None:
        return None
    then = kept.decided(job) or _told_by(job)
    now = decide(study, kept.context(job), protocols, then.decided_at)
    return Replayed(job, then, now, compare(then, now))


def _told_by(job: StudyJob) -> Decided:
    """The decision of a run whose verdicts were not kept, by the state in which it ended."""
    ended: dict[str, DecidedState] = {"unmatched": "unmatched", "unusable": "unusable"}
    state = ended.get(job.state, "read")
    protocol = "" if state == "unmatched" else job.protocol
    return Decided(state, protocol, tuple(job.reasons), (), run_started_at(job), False)


def _print_summary(replayed: list[Replayed], heard: int, days: float, screen: Console) -> None:
    counts = Counter(each.outcome for each in replayed)
    studies = f"{len(replayed)} {'study' if len(replayed) == 1 else 'studies'} of {_last(days)}"
    told = f"[bold]{studies}, {counts['differs']} would differ[/], {counts['open']} cannot be decided"
    why = " (a rule needs the EHR's context, which was not gathered then)" if counts["open"] else ""
    screen.print(f"{told}{why}.", soft_wrap=True)
    if left_out := heard - len(replayed):
        screen.print(f"{left_out} more left out: their images were never read, or are no longer kept.")


def _print_replayed(each: Replayed, screen: Console) -> None:
    screen.print(f"\n{each.then.decided_at:%Y-%m-%d %H:%M %Z}  [bold]{each.job.study_instance_uid}[/]", soft_wrap=True)
    told = Table.grid(padding=(0, 2, 0, 0))
    told.add_row("then", f"{_tell(each.then)}; its reading is {each.job.state}")
    told.add_row("now", "[dim]the same[/]" if each.outcome == "same" else _tell(each.now))
    for reason in _open_reasons(each.now) if each.outcome == "open" else each.differences:
        told.add_row("why", escape(reason))
    screen.print(Padding(told, (0, 0, 0, 2)))


def _tell(decided: Decided) -> str:
    if decided.state == "unmatched":
        return "read by no protocol"
    considered = decided.find(decided.protocol)
    name = f"{escape(decided.protocol)}{f' version {escape(considered.version)}' if considered else ''}"
    words = {"read": "read by", "open": "not decided yet for", "unusable": "series unusable for"}
    return f"{words[decided.state]} {name}"


def _open_reasons(now: Decided) -> tuple[str, ...]:
    considered = now.find(now.protocol)
    checks = considered.checks if considered else ()
    return tuple(f"{now.protocol}, {c.part}: {c.reason}" for c in checks if c.lets_in is None)
