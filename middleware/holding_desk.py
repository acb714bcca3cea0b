"""`wetread held`, `release` and `reject`: what waits for a person, and what the person decides."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from middleware.intake.holding import NotDecidable
from middleware.settings import Settings
from middleware.store.queries import Store, open_engine
from middleware.store.tables import StudyJob

Decide = Callable[..., StudyJob]


@contextmanager
def _store(settings: Settings) -> Iterator[Store]:
    store = Store(open_engine(settings.store_url))
    try:
        yield store
    finally:
        store.close()


def list_held(settings: Settings, screen: Console) -> None:
    """Print every held study, the oldest first, and what to type next."""
    with _store(settings) as store:
        jobs = store.jobs_in_state("held")
    if not jobs:
        screen.print("No study is held.")
        return
    table = Table("job", "study", "since", "why", show_lines=True)
    for job in jobs:
        why = "\n".join(f"- {escape(reason)}" for reason in job.reasons)
        table.add_row(job.job_id, job.study_instance_uid, f"{job.updated_at.astimezone():%Y-%m-%d %H:%M}", why)
    screen.print(table)
    screen.print('Correct what is wrong at its source, or: wetread release JOB --reason "..." | wetread reject JOB ...')


def decide(settings: Settings, action: Decide, job: str, person: str, reason: str, screen: Console) -> None:
    """Release or reject a job, named by its id or its study's UID, and print what follows. Raises BadParameter where
    that cannot be."""
    with _store(settings) as store:
        found = store.jobs_of_study(job)
        job_id = found[-1].job_id if found else job
        try:
            decided = action(store, job_id, person=person, reason=reason, now=datetime.now().astimezone())
        except LookupError as error:
            raise typer.BadParameter(
                f"there is no job and no study '{job}'; `wetread held` lists those that wait"
            ) from error
        except NotDecidable as error:
            raise typer.BadParameter(str(error)) from error
    follows = "the service reads it now" if decided.state == "accepted" else "nothing reads it from now on"
    screen.print(f"Job {decided.job_id} is [bold]{decided.state}[/] by {escape(person)}: {follows}.", soft_wrap=True)
