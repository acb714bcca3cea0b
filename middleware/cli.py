"""The `wetread` command. Exit codes: 0 done; 1 a system failed; 2 usage or settings; 3 no protocol matched;
4 input unusable or identities disagree; 5 a delivery ended dead or ambiguous, or a rendering failed its checks.
"""

import asyncio
import getpass
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from sqlalchemy.exc import DBAPIError

from middleware import app as service
from middleware import (
    checking,
    correction_desk,
    delivery_desk,
    explaining,
    holding_desk,
    process,
    replaying,
    retention,
    signing_keys,
    telemetry,
)
from middleware.errors import SettingsError
from middleware.intake.holding import reject_study, release_study
from middleware.intake.protocols import BUNDLED, load_protocol, load_protocols, replace_protocol
from middleware.release.corrections import Change
from middleware.release.redelivering import Replay, Word
from middleware.settings import Settings, load_settings

cli = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Wetread brings imaging AI into the clinic and its results back out.",
)
protocols_cli = typer.Typer(no_args_is_help=True, help="Look at, check and try reading protocols.")
cli.add_typer(protocols_cli, name="protocols")
keys_cli = typer.Typer(no_args_is_help=True, help="Make, change and list the keys of the sign-in at the EHR.")
cli.add_typer(keys_cli, name="keys")

screen = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="Settings file (default: WETREAD_CONFIG or wetread.yaml).")
]


class DeliveryState(StrEnum):
    """States of a delivery, as options name them."""

    PENDING = "pending"
    IN_FLIGHT = "in_flight"
    RETRYING = "retrying"
    DELIVERED = "delivered"
    AMBIGUOUS = "ambiguous"
    DEAD = "dead"


class Destination(StrEnum):
    """Destinations, as options name them."""

    PACS = "pacs"
    EHR = "ehr"
    RIS = "ris"


@cli.command("process")
def process_command(
    source: Annotated[str, typer.Argument(help="A folder of DICOM files, or a StudyInstanceUID to fetch.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the result's files.")],
    context: Annotated[Path | None, typer.Option(help="FHIR Bundle (JSON) with patient, order and labs.")] = None,
    protocol: Annotated[str, typer.Option(help="Read with this protocol only.")] = "",
    triton: Annotated[str, typer.Option(help="HOST:PORT of Triton's gRPC port; default: the bundled one.")] = "",
    config: ConfigOption = None,
) -> None:
    """Read one study now and write its result."""
    settings = load_settings(config)
    request = process.Request(source, out, context, protocol, triton)
    telemetry.quiet_logging()
    telemetry.listen(_show_progress)
    result = process.run_process(settings, request)
    _show_result(result, out)
    raise typer.Exit(result.exit_code)


_MARKS = {"done": "[green]✓[/]", "failed": "[red]✗[/]", "delivered": "[green]✓[/]"}


def _show_progress(progress: telemetry.Progress) -> None:
    """One line as a step or delivery ends; what is going on is shown while it lasts, on a terminal."""
    if progress.state in ("started", "going on"):
        if screen.is_terminal:
            screen.print(f"  … {escape(progress.step)} {escape(progress.detail)}", end="\r", overflow="ellipsis")
        return
    mark = _MARKS.get(progress.state, "[yellow]![/]")
    took = f"[dim]{progress.duration_s:6.2f} s[/]" if progress.duration_s else " " * 8
    state = "" if progress.state in ("done", "failed") else f"{progress.state}: "
    if screen.is_terminal:
        screen.print(" " * (screen.width - 1), end="\r")
    detail = "" if progress.state == "delivered" else escape(progress.detail)
    screen.print(f"{mark} {took} {escape(progress.step):<10} {state}{detail}".rstrip(" :"), soft_wrap=True)


_HEADLINES = {
    "unmatched": "No protocol applies to this study:",
    "unusable": "The images cannot be read safely; nothing was produced:",
    "rejected": "A person rejected this study; nothing was read (`wetread release` takes it back):",
    "held": "Held: identities do not agree; nothing was released:",
    "quarantined": "Quarantined: a rendering failed its checks; nothing was delivered:",
    "failed": "A system did not do its part; nothing was delivered:",
}


def _show_result(result: process.Result, out: Path) -> None:
    if result.state != "released":
        errors.print(f"[bold red]{_HEADLINES[result.state]}[/]")
        for reason in result.reasons:
            errors.print(f"  - {escape(reason)}", soft_wrap=True)
        return
    screen.print(f"\nResult in [bold]{escape(str(out))}[/]: {', '.join(f.name for f in result.files)}", soft_wrap=True)
    undelivered = [d for d in result.deliveries if d.state != "delivered"]
    if result.deliveries:
        screen.print(f"{len(result.deliveries) - len(undelivered)} of {len(result.deliveries)} deliveries arrived.")
    for delivery in undelivered:
        what = f"{delivery.artifact_name} to {delivery.destination} is {delivery.state}"
        errors.print(f"[red]{what}:[/] {escape(delivery.reason)}", soft_wrap=True)
    if any(d.state in ("pending", "retrying") for d in undelivered):
        errors.print("What is pending or retrying is left to `wetread serve`; `wetread deliveries` shows where it is.")


@cli.command()
def serve(config: ConfigOption = None) -> None:
    """Run the service: API, workflows and deliveries, from wetread.yaml."""
    with suppress(KeyboardInterrupt):  # told to stop, by whoever started it
        service.serve(load_settings(config))


@cli.command()
def worker(config: ConfigOption = None) -> None:
    """Run one more worker on the same database."""
    with suppress(KeyboardInterrupt):
        service.work(load_settings(config))


@cli.command()
def check(config: ConfigOption = None) -> None:
    """Validate settings and protocols, and ask every configured system whether it answers."""
    settings = load_settings(config)
    protocols = load_protocols(settings.protocols_dir)
    screen.print(f"[green]✓[/] settings, and {len(protocols)} protocol(s): {', '.join(protocols)}")
    probes = asyncio.run(checking.probe_all(settings))
    for probe in probes:
        mark = "[green]✓[/]" if probe.answers else "[red]✗[/]" if probe.configured else "[dim]-[/]"
        screen.print(f"{mark} {probe.system:<8} {escape(probe.text)}", soft_wrap=True)
    raise typer.Exit(0 if all(p.answers or not p.configured for p in probes) else 1)


@cli.command()
def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    config: ConfigOption = None,
) -> None:
    """Remove now what the retention policy no longer keeps; the service does so by itself."""
    for each in retention.prune_all(load_settings(config), dry_run=dry_run):
        size = f", {each.size_bytes / 1e6:.1f} MB" if each.size_bytes else ""
        screen.print(f"{each.count:8} {each.what}{size}{' would be removed' if dry_run else ''}")


@cli.command()
def explain(
    study_uid: Annotated[str, typer.Argument(help="The study's StudyInstanceUID.")], config: ConfigOption = None
) -> None:
    """Why protocols did or did not read a study, rule by rule, and where each result is now."""
    found = explaining.explain_study(load_settings(config), study_uid, screen)
    raise typer.Exit(0 if found else 2)


@cli.command()
def held(config: ConfigOption = None) -> None:
    """List the studies that are held for a person, with the reasons."""
    holding_desk.list_held(load_settings(config), screen)


JobArgument = Annotated[str, typer.Argument(help="The job's id, or the StudyInstanceUID.")]
ReasonOption = Annotated[str, typer.Option(help="Why, in a sentence without patient data; kept for good.")]
PersonOption = Annotated[str, typer.Option(help="Who decides; default: the user who runs the command.")]


@cli.command()
def release(
    job: JobArgument,
    reason: ReasonOption,
    person: PersonOption = "",
    overrule: Annotated[bool, typer.Option("--overrule", help="Also where somebody has rejected the study.")] = False,
    config: ConfigOption = None,
) -> None:
    """Have a held study read in spite of the reasons it was held for; the result says who released it."""
    _decide(partial(release_study, overrule=overrule), job, reason, person, config)


@cli.command()
def reject(job: JobArgument, reason: ReasonOption, person: PersonOption = "", config: ConfigOption = None) -> None:
    """Put a study away: no event reads it from now on, unless a person releases it with --overrule."""
    _decide(reject_study, job, reason, person, config)


def _decide(action: holding_desk.Decide, job: str, reason: str, person: str, config: Path | None) -> None:
    by = person or _user()
    decided = holding_desk.decide(load_settings(config), action, job, by, reason, screen, errors)
    raise typer.Exit(0 if decided else process.USAGE)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        raise SettingsError("the user who runs this command has no name here: say who decides with --person") from None


NameOption = Annotated[str, typer.Option("--person", help="Who: family^given, as DICOM writes names.")]
StudyArgument = Annotated[str, typer.Argument(help="The study's StudyInstanceUID, or the job's id.")]
EditsOption = Annotated[
    Path | None,
    typer.Option(help="JSON file: a list of {kind, tracking_id, key, value, reason}; see docs/site-guide.md."),
]


@cli.command()
def sign(
    study: StudyArgument,
    person: NameOption,
    organisation: Annotated[str, typer.Option(help="For which organisation.")],
    edits: EditsOption = None,
    text: Annotated[Path | None, typer.Option(help="The report in the signer's own words (UTF-8 text).")] = None,
    adopt: Annotated[bool, typer.Option("--adopt", help="Take over the new reading that is held.")] = False,
    config: ConfigOption = None,
) -> None:
    """Sign a released result: final in EHR, RIS and PACS, with what was changed; again after that: corrected."""
    at = datetime.now().astimezone()
    words = text.read_text(encoding="utf-8") if text else None
    changes = correction_desk.read_edits(edits, person, at)
    asked = Change("sign", person, at, "signed", organisation, changes, words, adopt)
    correction_desk.change(load_settings(config), study, asked, screen)


@cli.command()
def edit(
    study: StudyArgument,
    person: NameOption,
    reason: ReasonOption,
    edits: EditsOption = None,
    config: ConfigOption = None,
) -> None:
    """Change a released result that nobody has signed yet; it stays preliminary."""
    at = datetime.now().astimezone()
    asked = Change("edit", person, at, reason, edits=correction_desk.read_edits(edits, person, at))
    correction_desk.change(load_settings(config), study, asked, screen)


@cli.command()
def withdraw(study: StudyArgument, person: NameOption, reason: ReasonOption, config: ConfigOption = None) -> None:
    """Take a released result back: entered in error in every system that got it. Nothing follows it."""
    asked = Change("withdraw", person, datetime.now().astimezone(), reason)
    correction_desk.change(load_settings(config), study, asked, screen)


deliveries_cli = typer.Typer(invoke_without_command=True, help="List deliveries, or show one of them.")
cli.add_typer(deliveries_cli, name="deliveries")


@deliveries_cli.callback()
def deliveries(
    context: typer.Context,
    state: Annotated[DeliveryState | None, typer.Option(help="Only those in this state.")] = None,
    destination: Annotated[Destination | None, typer.Option(help="Only those to this destination.")] = None,
    study: Annotated[str, typer.Option(help="Only those of this study (UID) or job.")] = "",
    config: ConfigOption = None,
) -> None:
    """List deliveries with their states, and the destinations that are down."""
    if context.invoked_subcommand is None:
        wanted = (str(state or ""), str(destination or ""), study)
        delivery_desk.list_deliveries(load_settings(config), *wanted, screen)


@deliveries_cli.command("show")
def show_delivery(
    delivery: Annotated[str, typer.Argument(help="The delivery's id, or its beginning.")],
    save: Annotated[Path | None, typer.Option(help="Write the bytes that were or are to be sent to this file.")] = None,
    config: ConfigOption = None,
) -> None:
    """Show everything about one delivery: reason, receipt, tries, decisions, and where its bytes are."""
    delivery_desk.show_delivery(load_settings(config), delivery, save, screen)


@cli.command()
def retry(
    deliveries: Annotated[list[str], typer.Argument(help="Ids of deliveries, or their beginnings.")],
    reason: ReasonOption,
    delivered: Annotated[
        bool, typer.Option("--delivered", help="Do not send it: somebody found it at the destination.")
    ] = False,
    person: PersonOption = "",
    config: ConfigOption = None,
) -> None:
    """Try deliveries again that are dead or ambiguous, or settle ambiguous ones as delivered."""
    word = Word(person or getpass.getuser(), reason, datetime.now().astimezone())
    delivery_desk.retry(load_settings(config), deliveries, word, screen, delivered=delivered)


@cli.command()
def replay(
    study_uid: Annotated[str, typer.Argument(help="The study's StudyInstanceUID.")],
    reason: ReasonOption,
    destination: Annotated[Destination | None, typer.Option(help="Only to this destination.")] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Also what was delivered; once for each reason, however often asked.")
    ] = False,
    person: PersonOption = "",
    config: ConfigOption = None,
) -> None:
    """Send the released result of a study again, with the same bytes and ids: what is dead or was never sent."""
    wish = Replay(str(destination or ""), again, key=reason)
    word = Word(person or getpass.getuser(), reason, datetime.now().astimezone())
    delivery_desk.replay(load_settings(config), study_uid, wish, word, screen)


@cli.command()
def demo(
    study: Annotated[Path | None, typer.Option(help="A folder with a real study instead of the phantom.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Check the end state, then stop.")] = False,
) -> None:
    """Start a simulated hospital around the service, read a study, and show what every system received."""
    from deploy.hospital.demo import run_demo  # the simulator is no part of a production image

    raise typer.Exit(run_demo(study, once=once, console=screen))


@protocols_cli.command("list")
def list_protocols(config: ConfigOption = None) -> None:
    """List the protocols in use."""
    table = Table("name", "version", "title", "model", "roles", "sends to")
    for one in load_protocols(_folder(load_settings(config))).values():
        protocol = one.protocol
        roles = ", ".join(r.name if r.required else f"({r.name})" for r in protocol.roles)
        to = ", ".join(d for d in ("pacs", "ehr", "ris") if getattr(protocol.outputs, d))
        model = f"{protocol.model.name} v{protocol.model.version}"
        table.add_row(protocol.name, protocol.version, protocol.title, model, roles, to)
    screen.print(table)


@protocols_cli.command("validate")
def validate_protocols(
    files: Annotated[list[Path] | None, typer.Argument(help="Protocol files; default: those in use.")] = None,
    config: ConfigOption = None,
) -> None:
    """Check protocol files and name each line in error."""
    if not files:
        folder = _folder(load_settings(config))
        files = sorted(folder.glob("*.yaml"))
    for file in files:
        load_protocol(file)
        screen.print(f"[green]✓[/] {escape(str(file))}")


@protocols_cli.command("dry-run")
def dry_run(
    source: Annotated[Path | None, typer.Argument(help="A folder of DICOM files; or give --past.")] = None,
    protocol: Annotated[Path | None, typer.Option(help="A protocol file to try; default: those in use.")] = None,
    past: Annotated[float | None, typer.Option(help="Replay the studies heard of in the last DAYS days.")] = None,
    show_all: Annotated[bool, typer.Option("--all", help="With --past: also those that stay the same.")] = False,
    config: ConfigOption = None,
) -> None:
    """Show which protocol would read a study, and why; nothing is read, sent or changed.

    Of a folder: with --protocol that protocol alone is tried. With --past DAYS: the protocols in use, with that file in
    the place of the one of its name, decide again about each study whose images were read then, by what was kept of
    images and EHR. Only what rules decide is replayed: match, roles, when and set_aside.
    """
    if (source is None) == (past is None):
        raise SettingsError("dry-run needs a folder of DICOM files or --past DAYS, and not both")
    settings = load_settings(config)
    tried = load_protocol(protocol) if protocol else None
    in_use = {} if tried and source else load_protocols(settings.protocols_dir)
    protocols = replace_protocol(in_use, tried) if tried else in_use
    if source is not None:
        raise typer.Exit(asyncio.run(replaying.dry_run(source, protocols, screen)))
    raise typer.Exit(replaying.replay_past(settings, past or 0.0, protocols, screen, show_all=show_all))


class Algorithm(StrEnum):
    """How a key signs (SMART App Launch 2.2)."""

    ES384 = "ES384"
    RS384 = "RS384"


@keys_cli.command("new")
def new_key(
    file: Annotated[Path, typer.Argument(help="JWK set with private keys; made where it is not there.")],
    algorithm: Annotated[Algorithm, typer.Option(help="What the EHR takes.")] = Algorithm.ES384,
    overlap_hours: Annotated[
        float,
        typer.Option(min=0, max=8760, help="So long the new key is published before it signs, the old ones after."),
    ] = 24.0,
) -> None:
    """Add a key, which takes over once the EHR has had time to see it; drop keys that have ended."""
    signing_keys.make_signing_key(file, algorithm, overlap_hours * 3600, screen)


@keys_cli.command("list")
def list_keys(
    file: Annotated[Path | None, typer.Argument(help="A file of keys; default: ehr.oauth.key_files.")] = None,
    jwks: Annotated[bool, typer.Option("--jwks", help="Print the public JWK set, to register it at the EHR.")] = False,
    config: ConfigOption = None,
) -> None:
    """Show which key signs, which are published, and until when."""
    files = [file] if file else _key_files(load_settings(config))
    signing_keys.list_signing_keys(files, jwks, screen)


def _key_files(settings: Settings) -> Sequence[Path]:
    if settings.ehr is None or settings.ehr.oauth is None:
        raise SettingsError("keys list: no sign-in by keys is set (ehr.oauth.key_files); or name a file")
    return settings.ehr.oauth.key_files


def _folder(settings: Settings) -> Path:
    return settings.protocols_dir or BUNDLED


def main() -> None:
    """Run the command; every failure is a readable line and an exit code, never a traceback."""
    # Ended by a supervisor or by Ctrl-C: either way servers and temporary folders of the run go first.
    # A shell starts what it puts into the background with SIGINT ignored; then neither signal would stop us.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        cli()
    except SettingsError as error:
        errors.print(f"[bold red]Cannot start:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(process.USAGE)
    except KeyboardInterrupt:
        errors.print("Stopped.")
        sys.exit(process.STOPPED)
    except Exception as error:
        if os.environ.get("WETREAD_DEBUG"):
            raise
        errors.print(_explain_failure(error), soft_wrap=True)
        sys.exit(process.FAILED)


def _explain_failure(error: Exception) -> str:
    """What failed, in a line or two. A database error is told without its statement, which holds values."""
    if isinstance(error, OSError):
        return f"[bold red]A file or connection failed:[/] {escape(str(error))}"
    if isinstance(error, DBAPIError):
        return f"[bold red]The database failed:[/] {escape(str(error.orig))}"
    return (
        f"[bold red]Unexpected {type(error).__name__}:[/] {escape(str(error))}\n"
        "Set WETREAD_DEBUG=1 to see where, and report it."
    )


if __name__ == "__main__":
    main()
