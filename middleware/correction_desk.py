"""`wetread sign`, `edit` and `withdraw`: what a person does to a released result."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from rich.console import Console
from rich.markup import escape

from mappings.model.revision import Edit, EditKind, RevisionRefused
from middleware.intake.holding import NotDecidable
from middleware.kept import Kept, open_kept
from middleware.release.corrections import Change, ask_for_change
from middleware.settings import Settings


class EditIn(BaseModel):
    """One edit as a file has it; who and when come from the command."""

    model_config = ConfigDict(extra="forbid")
    kind: EditKind
    tracking_id: str = ""
    key: str = ""
    value: str = ""
    reason: str = ""


_EDITS = TypeAdapter(list[EditIn])


def read_edits(file: Path | None, person: str, at: datetime) -> tuple[Edit, ...]:
    """The edits in a JSON file: a list of kind, tracking_id, key, value, reason. Raises BadParameter naming what is
    wrong."""
    if file is None:
        return ()
    try:
        given = _EDITS.validate_python(json.loads(file.read_text(encoding="utf-8")))
        return tuple(Edit(person=person, at=at, **vars(one)) for one in given)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise typer.BadParameter(f"--edits {file}: cannot be read as JSON: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise typer.BadParameter(f"--edits {file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def change(settings: Settings, study: str, asked: Change, screen: Console) -> None:
    """Ask for a change of a study's released result and print what follows. Raises BadParameter where it cannot be."""
    with open_kept(settings) as kept:
        if kept is None:
            raise typer.BadParameter("nothing was ever read here")
        job = _ask(kept, study, asked)
    screen.print(
        f"Job {job.job_id}: a revision is asked for by {escape(asked.person)}. The service makes it at once and brings "
        "it to every system that got the result; `wetread explain` shows how far it is.",
        soft_wrap=True,
    )


def _ask(kept: Kept, study: str, asked: Change) -> Any:
    found = kept.store.jobs_of_study(study)
    try:
        return ask_for_change(kept.store, kept.artifacts, found[-1].job_id if found else study, asked)
    except LookupError as error:
        raise typer.BadParameter(f"no study and no job '{study}'") from error
    except (NotDecidable, RevisionRefused, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
