"""`wetread explain` and `protocols dry-run`: why a study was read or not, and where its result is now."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mappings.model.findings import RoleChoice
from mappings.model.protocol import Protocol
from mappings.model.study import Study
from mappings.reading.series_to_roles import choose_series, match_protocol
from middleware.bootstrap import open_folder
from middleware.errors import SettingsError, Stopped
from middleware.intake.images import check_roles, read_study
from middleware.intake.protocols import load_protocols
from middleware.settings import Settings
from middleware.store.artifacts import ArtifactStore
from middleware.store.queries import Store, open_engine
from middleware.store.tables import StudyJob


def explain_study(settings: Settings, study_uid: str, screen: Console) -> bool:
    """Print everything known of a study's readings; False where nothing is known."""
    store = Store(open_engine(settings.store_url))
    artifacts = ArtifactStore(settings.artifacts_url or str(settings.data_dir.absolute() / "artifacts"))
    jobs = store.jobs_of_study(study_uid)
    if not jobs:
        screen.print(f"Nothing is known of study {escape(study_uid)}: no event named it.")
        return False
    for job in jobs:
        _explain_job(job, store, artifacts, settings, screen)
    store.close()
    return True


def _explain_job(job: StudyJob, store: Store, artifacts: ArtifactStore, settings: Settings, screen: Console) -> None:
    screen.print(f"[bold]Job {job.job_id}[/] is [bold]{job.state}[/], revision {job.revision}")
    for event in store.events_of_job(job.job_id):
        screen.print(f"  heard of it by {event.source} at {event.received_at:%Y-%m-%d %H:%M:%S %Z}")
    for reason in job.reasons:
        screen.print(f"  [red]because[/] {escape(reason)}", soft_wrap=True)
    if digest := job.facts.get("study"):
        study = TypeAdapter(Study).validate_json(artifacts.get(digest))
        _print_matches(study, [p.protocol for p in load_protocols(settings.protocols_dir).values()], screen)
    if digest := job.facts.get("roles"):
        print_roles(TypeAdapter(tuple[RoleChoice, ...]).validate_json(artifacts.get(digest)), screen)
    if answer := job.facts.get("answer"):
        screen.print(f"  model [bold]{answer['name']}[/] version {answer['version']}")
    steps = Table("step", "started", "took", "ended", title="steps", title_justify="left")
    for run in store.step_runs(job.job_id):
        steps.add_row(run.step, f"{run.started_at:%H:%M:%S}", f"{run.duration_s:.2f} s", run.outcome)
    screen.print(steps)
    deliveries = Table(
        "to", "what", "rev", "state", "tries", "receipt or reason", title="deliveries", title_justify="left"
    )
    for each in store.deliveries(job_id=job.job_id):
        said = escape(each.reason or each.receipt)
        revision, tries = str(each.revision), str(each.attempts)
        deliveries.add_row(each.destination, each.artifact_name, revision, each.state, tries, said)
    screen.print(deliveries)


def _print_matches(study: Study, protocols: Sequence[Protocol], screen: Console) -> None:
    for protocol in protocols:
        reasons = match_protocol(study, protocol)
        verdict = f"[yellow]does not apply:[/] {escape('; '.join(reasons))}" if reasons else "[green]applies[/]"
        screen.print(f"  protocol [bold]{protocol.name}[/] {verdict}", soft_wrap=True)


def print_roles(roles: Sequence[RoleChoice], screen: Console) -> None:
    """Print each role with the series that plays it, and every reason."""
    for choice in roles:
        taken = f"[green]{escape(choice.series_label)}[/]" if choice.series_instance_uid else "[yellow]no series[/]"
        need = "" if choice.required else " (optional)"
        screen.print(f"  role [bold]{choice.role}[/]{need}, {choice.title}: {taken}")
        for reason in choice.reasons:
            screen.print(f"    [dim]{escape(reason)}[/]", soft_wrap=True)


async def dry_run(source: Path, protocols: Sequence[Protocol], screen: Console) -> int:
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
        study = read_study(spool / "images")
        _print_matches(study, protocols, screen)
        matched = [p for p in protocols if not match_protocol(study, p)]
        if not matched:
            return 3
        roles = choose_series(study, matched[0])
        print_roles(roles, screen)
        check_roles(study, matched[0], roles)
    except Stopped as stop:
        for reason in stop.reasons:
            screen.print(f"  [red]refused:[/] {escape(reason)}", soft_wrap=True)
        return 4
    finally:
        shutil.rmtree(spool, ignore_errors=True)
    screen.print("[green]This study would be read.[/]")
    return 0
