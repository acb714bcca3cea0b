"""`wetread explain`: why a study was read or not, and where its result is now."""

from collections.abc import Mapping, Sequence
from datetime import datetime

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from middleware.intake.comparing import compare
from middleware.intake.deciding import Considered, Decided, decide
from middleware.intake.inbox import run_started_at
from middleware.intake.orders import NUMBERS
from middleware.intake.protocols import LoadedProtocol, load_protocols
from middleware.kept import Kept, open_kept
from middleware.release.health import reason_of
from middleware.settings import Settings
from middleware.showing import diff_lines, issue_lines, print_considered, print_indented, print_roles
from middleware.store.artifacts import read_answer
from middleware.store.heard import HeardMessage, OrderRecord
from middleware.store.tables import Delivery, StudyJob

Protocols = Mapping[str, LoadedProtocol]


def explain_study(settings: Settings, study_uid: str, screen: Console) -> bool:
    """Print everything known of a study's readings and orders; False where nothing is known."""
    protocols = load_protocols(settings.protocols_dir)
    with open_kept(settings) as kept:
        is_known = kept is not None and _explain_kept(study_uid, kept, protocols, screen)
    if not is_known:
        screen.print(f"Nothing is known of study {escape(study_uid)}: no event named it.", soft_wrap=True)
    return is_known


def _explain_kept(study_uid: str, kept: Kept, protocols: Protocols, screen: Console) -> bool:
    jobs = kept.store.jobs_of_study(study_uid)
    for job in jobs:
        _explain_job(job, kept, protocols, screen)
    is_ordered = _explain_orders(study_uid, jobs, kept, screen)
    return bool(jobs) or is_ordered


def _explain_job(job: StudyJob, kept: Kept, protocols: Protocols, screen: Console) -> None:
    screen.print(f"[bold]Job {job.job_id}[/] is [bold]{job.state}[/], revision {job.revision}")
    for event in kept.store.events_of_job(job.job_id):
        screen.print(f"  heard of it by {event.source} at {_time(event.received_at)}")
    for reason in job.reasons:
        print_indented(f"[red]because[/] {escape(reason)}", 2, screen)
    for each in kept.store.decisions(job.job_id):
        why = f": {escape(each.reason)}" if each.reason else ""
        told = f"[bold]{escape(each.action)}[/] by {escape(each.person)} at {_time(each.decided_at)}{why}"
        print_indented(told, 2, screen)
    for reason in (job.facts.get("released_despite") or {"reasons": ()})["reasons"]:
        print_indented(f"released in spite of: {escape(reason)}", 2, screen)
    _explain_decision(job, kept, protocols, screen)
    print_roles(kept.roles(job), screen)
    if answer := job.facts.get("answer"):
        screen.print(f"  model [bold]{answer['name']}[/] version {answer['version']}")
    _print_steps(job, kept, screen)
    _print_deliveries(job, kept, screen)


def _time(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S %Z}"


# Rules


def _explain_decision(job: StudyJob, kept: Kept, protocols: Protocols, screen: Console) -> None:
    """Print the verdicts as they were when the study was read, and what differs in today's files."""
    decided = kept.decided(job)
    if decided is None:
        screen.print("  [dim]No rule was asked: the images were not read so far.[/]")
        return
    knowing = "with the EHR's context" if decided.knew_context else "by the images alone, before the EHR was asked"
    screen.print(f"[bold]Rules[/], as applied in the run of {_time(decided.decided_at)}, {knowing}")
    if decided.decided_at != run_started_at(job):
        screen.print(f"  [yellow]an earlier run; that of {_time(run_started_at(job))} has not come so far[/]")
    for considered in decided.considered:
        print_considered(considered, decided, screen)
        _print_file_changes(considered, protocols.get(considered.protocol), kept, screen)
    _explain_today(job, decided, kept, protocols, screen)


def _print_file_changes(then: Considered, today: LoadedProtocol | None, kept: Kept, screen: Console) -> None:
    if today is None:
        screen.print(f"    [yellow]{escape(then.protocol)} is no longer among the protocols in use[/]")
    elif today.digest != then.sha256:
        version = today.protocol.version
        put_up = "still version" if version == then.version else "now version"
        screen.print(f"    [yellow]the file was changed since, {put_up} {escape(version)}:[/]")
        text = kept.text(then.sha256)
        for line in diff_lines(text, today.text) if text is not None else ["the earlier text is no longer kept"]:
            print_indented(f"[dim]{escape(line)}[/]", 6, screen)


def _explain_today(job: StudyJob, decided: Decided, kept: Kept, protocols: Protocols, screen: Console) -> None:
    """Print what today's files would make of the study, where they are others than those that were applied."""
    study = kept.study(job)
    applied = {each.protocol: each.sha256 for each in decided.considered}
    if study is None or applied == {name: loaded.digest for name, loaded in protocols.items()}:
        return
    now = decide(study, kept.context(job), protocols, decided.decided_at)
    differences = compare(decided, now)
    what = f"{now.state}{f' ({now.protocol})' if now.protocol else ''}" if differences else "the same"
    screen.print(f"  By today's files the study would be: [bold]{escape(what)}[/]")
    for difference in differences:
        print_indented(escape(difference), 4, screen)


# Steps and deliveries


def _print_steps(job: StudyJob, kept: Kept, screen: Console) -> None:
    steps = Table("step", "started", "took", "ended", title="steps", title_justify="left")
    for run in kept.store.step_runs(job.job_id):
        steps.add_row(run.step, f"{run.started_at:%H:%M:%S}", f"{run.duration_s:.2f} s", run.outcome)
    screen.print(steps)


def _print_deliveries(job: StudyJob, kept: Kept, screen: Console) -> None:
    planned = kept.store.deliveries(job_id=job.job_id)
    if not planned:
        screen.print("No delivery was planned.")
        return
    columns = ("to", "what", "rev", "state", "tries", "receipt or reason")
    healths = kept.deliveries.healths()
    deliveries = Table(*columns, title="deliveries", title_justify="left")
    for each in planned:
        said = escape(reason_of(each, healths) or each.receipt)
        revision, tries = str(each.revision), str(each.attempts)
        deliveries.add_row(each.destination, each.artifact_name, revision, each.state, tries, said)
    screen.print(deliveries)
    for each in planned:
        _print_answer(each, kept, screen)


def _print_answer(delivery: Delivery, kept: Kept, screen: Console) -> None:
    """Print the destination's own words to the last attempt, where they were kept."""
    if not (answers := kept.store.answers(delivery.delivery_id)):
        return
    last = answers[-1]
    told = f"to attempt {last.attempt} with {delivery.artifact_name}"
    screen.print(f"  [bold]{delivery.destination}[/] said {escape(told)}, {_time(last.received_at)}:", soft_wrap=True)
    for line in issue_lines(read_answer(kept.artifacts, last.digest)) or ["(no longer kept)"]:
        print_indented(escape(line), 4, screen)


# Orders


def _explain_orders(study_uid: str, jobs: Sequence[StudyJob], kept: Kept, screen: Console) -> bool:
    """Print the orders that name the study, and the messages about it that were refused; False where there is none."""
    studies = [study for job in jobs if (study := kept.study(job))]
    accession = studies[-1].accession_number if studies else ""
    orders = kept.heard.orders_of_study(study_uid, accession)
    numbers = {(name, getattr(order, name)) for order in orders for name in NUMBERS}
    refused = kept.heard.refused_about(numbers | {("study_instance_uid", study_uid), ("accession_number", accession)})
    if (orders or refused) and not jobs:
        screen.print("[bold]No reading[/]: HL7 messages name this study, but nothing has asked for it to be read yet.")
    for order in orders:
        _print_order(order, screen)
    for message in refused:
        _print_refused(message, screen)
    return bool(orders or refused)


def _print_order(order: OrderRecord, screen: Console) -> None:
    words = ("placer", "filler", "accession", "study")
    numbers = [f"{word} {value}" for word, name in zip(words, NUMBERS, strict=True) if (value := getattr(order, name))]
    held = ", on hold" if order.is_on_hold else ""
    found = f"its study was found {_time(order.handed_at)}" if order.handed_at else "its study was not found so far"
    status = order.status or "of no stated status"
    screen.print(f"[bold]Order[/] is [bold]{status}[/]{held} since {_time(order.updated_at)}; {found}", soft_wrap=True)
    screen.print(f"  {escape(', '.join(numbers))}", soft_wrap=True)


def _print_refused(message: HeardMessage, screen: Console) -> None:
    what = f"{message.message_type} of {_time(message.received_at)}, control id {message.control_id or 'empty'}"
    screen.print(f"  [red]refused[/] {escape(what)}", soft_wrap=True)
    for note in message.notes:
        print_indented(escape(note), 4, screen)
