"""`wetread deliveries`, `retry` and `replay`: where results are, and what a person does about those that wait."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from middleware.intake.protocols import load_protocols
from middleware.kept import Kept, open_kept
from middleware.release.deliveries import DESTINATIONS
from middleware.release.health import reason_of
from middleware.release.redelivering import (
    NotDeliverable,
    Replay,
    Word,
    replay_result,
    retry_delivery,
    settle_delivered,
)
from middleware.settings import Settings
from middleware.showing import print_indented
from middleware.store.tables import Delivery, DestinationHealth, StudyJob

MOST_ROWS = 200
SHORT = 8
"""So many characters of an id tell deliveries apart, nearly always; a command takes any beginning that does."""
_COLOURS = {"delivered": "green", "dead": "red", "ambiguous": "magenta", "retrying": "yellow"}
_DOUBLED = {
    "ris": "If it did arrive and the RIS does not drop duplicates by MSH-10, the RIS has the report twice.",
    "ehr": "Every entry is conditional: the EHR stores nothing twice.",
    "pacs": "The instance keeps its UID: the PACS stores nothing twice.",
}


@contextmanager
def _kept(settings: Settings) -> Iterator[Kept]:
    with open_kept(settings) as kept:
        if kept is None:
            raise typer.BadParameter("nothing was ever read here: there are no deliveries")
        yield kept


# Looking


def list_deliveries(settings: Settings, state: str, destination: str, study: str, screen: Console) -> None:
    """Print the deliveries that match, in the order in which they were planned, and whether a destination is down."""
    with _kept(settings) as kept:
        job_ids = [job.job_id for job in kept.store.jobs_of_study(study)] or [study] if study else None
        found = kept.deliveries.search(state=state, destination=destination, job_ids=job_ids, limit=MOST_ROWS + 1)
        healths = kept.deliveries.healths()
        print_rows(found[:MOST_ROWS], healths, screen)
        if len(found) > MOST_ROWS:
            screen.print(f"These are the first {MOST_ROWS}; narrow them with --state, --destination or a study.")
    for each, health in healths.items():
        if health.down_since is not None:
            since = f"[red]{each} is down[/] since {_when(health.down_since)}; next probe {_when(health.probe_at)}"
            screen.print(f"{since}: {escape(health.reason)}", soft_wrap=True)
    _print_next(found, screen)


def print_rows(found: Sequence[Delivery], healths: Mapping[str, DestinationHealth], screen: Console) -> None:
    """Print two lines for each delivery: where it is, and below that what the destination said or why it waits."""
    if not found:
        screen.print("No delivery matches.")
        return
    screen.print(f"[bold]{_row('id', 'state', 'to', 'what', 'rev', 'tries', 'since')}[/]")
    for each in found:
        name = Path(each.artifact_name).name + (" (again)" if each.replay else "")
        since = f"{each.updated_at.astimezone():%Y-%m-%d %H:%M}"
        columns = (each.state, each.destination, name, str(each.revision), str(each.attempts), since)
        screen.print(f"[{_COLOURS.get(each.state, 'default')}]{escape(_row(each.delivery_id, *columns))}[/]")
        if said := reason_of(each, healths) or each.receipt:
            print_indented(f"[dim]{escape(said)}[/]", SHORT + 2, screen)


def _row(identity: str, state: str, to: str, what: str, revision: str, tries: str, since: str) -> str:
    what = what if len(what) <= 32 else f"{what[:31]}…"
    return f"{identity[:SHORT]:<{SHORT}}  {state:<9}  {to:<4}  {what:<32}  {revision:>3}  {tries:>5}  {since:<16}"


def _print_next(found: Sequence[Delivery], screen: Console) -> None:
    count = Counter(each.state for each in found)
    if count["dead"] or count["ambiguous"]:
        waiting = f"{count['dead']} dead and {count['ambiguous']} ambiguous wait for a person"
        screen.print(f'{waiting}: wetread deliveries show ID, then wetread retry ID --reason "..."', soft_wrap=True)


def show_delivery(settings: Settings, delivery_id: str, save: Path | None, screen: Console) -> None:
    """Print everything about one delivery, and write its bytes to a file where one is named."""
    with _kept(settings) as kept:
        delivery = _find(kept, delivery_id)
        job = kept.store.job(delivery.job_id)
        reason = reason_of(delivery, kept.deliveries.healths())
        for name, value in _facts(delivery, reason, job, settings).items():
            screen.print(f"[dim]{name:>12}[/]  {escape(value)}", soft_wrap=True)
        for decision in kept.store.decisions(delivery.job_id):
            if decision.action in ("retry", "delivered", "replay"):
                said = f"{_when(decision.decided_at)} {decision.action} by {decision.person}: {decision.reason}"
                screen.print(f"[dim]{'decided':>12}[/]  {escape(said)}", soft_wrap=True)
        if save is not None:
            save.write_bytes(_bytes(kept, delivery))
            screen.print(f"Written to {escape(str(save))}.", soft_wrap=True)


def _facts(delivery: Delivery, reason: str, job: StudyJob, settings: Settings) -> dict[str, str]:
    store = settings.artifacts_url or str(settings.data_dir.absolute() / "artifacts")
    facts = {
        "delivery": delivery.delivery_id,
        "study": job.study_instance_uid,
        "what": f"{delivery.artifact_name}, revision {delivery.revision}",
        "to": delivery.destination,
        "state": delivery.state,
        "reason": reason,
        "receipt": delivery.receipt,
        "replay": delivery.replay,
        "tries": f"{delivery.attempts}, the first {_when(delivery.tried_since)}" if delivery.tried_since else "none",
        "next try": _when(delivery.due_at),
        "planned": _when(delivery.created_at),
        "changed": _when(delivery.updated_at),
        "bytes": f"sha256 {delivery.digest} in {store} (--save FILE writes them)",
    }
    return {name: value for name, value in facts.items() if value}


def _bytes(kept: Kept, delivery: Delivery) -> bytes:
    try:
        return kept.artifacts.get(delivery.digest)
    except (FileNotFoundError, ValueError) as error:
        raise typer.BadParameter(f"the bytes cannot be given: {error}") from error


def _find(kept: Kept, delivery_id: str) -> Delivery:
    try:
        return kept.deliveries.find(delivery_id)
    except LookupError as error:
        raise typer.BadParameter(f"{error}; `wetread deliveries` lists them") from error


def _when(at: datetime | None) -> str:
    return f"{at.astimezone():%Y-%m-%d %H:%M:%S}" if at else ""


# Deciding


def retry(settings: Settings, ids: Sequence[str], word: Word, screen: Console, *, delivered: bool) -> None:
    """Have deliveries tried again, or taken as arrived, and print what follows. Raises BadParameter where one of them
    cannot be; those before it are decided."""
    with _kept(settings) as kept:
        for delivery in [_find(kept, one) for one in ids]:
            name = f"{delivery.artifact_name} to {delivery.destination}"
            try:
                decide = settle_delivered if delivered else retry_delivery
                decided = decide(kept.deliveries, delivery, word)
            except NotDeliverable as error:
                raise typer.BadParameter(f"{name} ({delivery.delivery_id[:SHORT]}): {error}") from error
            follows = "" if delivered else ": the service sends it now"
            screen.print(f"{escape(name)} is [bold]{decided.state}[/]{follows}.", soft_wrap=True)
            if delivery.state == "ambiguous" and not delivered:
                screen.print(f"  It was ambiguous. {_DOUBLED[delivery.destination]}", soft_wrap=True)


def replay(settings: Settings, study: str, wish: Replay, word: Word, screen: Console) -> None:
    """Send the released result of a study again, and print what goes. Raises BadParameter where that cannot be."""
    with _kept(settings) as kept:
        jobs = kept.store.jobs_of_study(study)
        protocols = load_protocols(settings.protocols_dir)
        if not jobs or jobs[-1].protocol not in protocols:
            raise typer.BadParameter(f"there is no reading of '{study}' by a protocol in use")
        outputs = protocols[jobs[-1].protocol].protocol.outputs
        configured = [name for name in DESTINATIONS if getattr(settings, name) is not None]
        try:
            going = replay_result(kept.store, kept.deliveries, jobs[-1], outputs, configured, wish, word)
        except NotDeliverable as error:
            raise typer.BadParameter(str(error)) from error
    for delivery in going:
        screen.print(f"{escape(delivery.artifact_name)} to {delivery.destination}: the service sends it now.")
    if not going:
        hint = "was asked for before" if wish.again else "is on its way or was delivered; --again sends that too"
        screen.print(f"Nothing is sent: everything {hint}.")
