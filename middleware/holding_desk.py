"""`wetread held`, `release` and `reject`: what waits for a person, and what the person decides."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime

from rich.console import Console
from rich.markup import escape

from middleware.intake.holding import NotDecidable
from middleware.settings import Settings
from middleware.showing import print_indented
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
    for job in jobs:
        # No table: ids are to be copied whole, however narrow the screen is.
        screen.print(f"[bold]{job.job_id}[/] held since {job.updated_at.astimezone():%Y-%m-%d %H:%M}", soft_wrap=True)
        screen.print(f"  study {escape(job.study_instance_uid)}", soft_wrap=True)
        for reason in job.reasons:
            print_indented(f"- {escape(reason)}", 2, screen)
    screen.print("\nCorrect what is wrong at its source, and the next event of the study reads it again. Or:")
    screen.print('  wetread release JOB --reason "..."   have it read in spite of these reasons', soft_wrap=True)
    screen.print('  wetread reject JOB --reason "..."    put it away', soft_wrap=True)


def decide(
    settings: Settings, action: Decide, job: str, person: str, reason: str, screen: Console, errors: Console
) -> bool:
    """Release or reject a job, named by its id or its study's UID, and print what follows; False where that cannot be,
    with the reason printed to `errors`."""
    with _store(settings) as store:
        found = store.jobs_of_study(job)
        job_id = found[-1].job_id if found else job
        try:
            decided = action(store, job_id, person=person, reason=reason, now=datetime.now().astimezone())
        except LookupError:
            return _refuse(f"there is no job and no study '{job}'; `wetread held` lists those that wait", errors)
        except NotDecidable as refusal:
            return _refuse(str(refusal), errors)
        by = store.decisions(job_id)[-1].person
    follows = _FOLLOWS[decided.state]
    told = f"Job {decided.job_id} is [bold]{decided.state}[/], decided by {escape(by)}: {follows}."
    screen.print(told, soft_wrap=True)
    return True


def _refuse(why: str, errors: Console) -> bool:
    errors.print(f"[bold red]Nothing was decided:[/] {escape(why)}", soft_wrap=True)
    return False


_FOLLOWS = {
    "accepted": "the service reads it now",
    "rejected": "nothing reads it from now on but `wetread release --overrule`",
}
