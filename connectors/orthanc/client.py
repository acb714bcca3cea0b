"""Orthanc's change log as asyncio calls: which studies began or grew since a sequence number.

Source: Orthanc Book, "REST API of Orthanc", section "Tracking changes" (`/changes`, from Orthanc 1.0 on).
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from connectors.errors import NotThere, Permanent
from connectors.orthanc.config import OrthancConfig
from connectors.orthanc.http import OrthancHttp

Json = dict[str, Any]

# Which kinds are told, and where the study of each is found. NewInstance is left out: one look-up an instance is too
# dear, and StableStudy follows every instance once its study rests. UpdatedMetadata, UpdatedAttachment and the
# patient's kinds bring no image; of StableSeries the study's own StableStudy tells more.
STUDY_OF = {
    "NewStudy": "/studies/{id}",
    "StableStudy": "/studies/{id}",
    "NewSeries": "/series/{id}/study",
}
# Five groups of a SHA-1 hash.
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{8}){4}")


@dataclass(frozen=True)
class Change:
    """Something happened to a study: `kind` is NewStudy, NewSeries (in this study) or StableStudy."""

    sequence: int
    kind: str
    study_instance_uid: str


@dataclass(frozen=True)
class Changes:
    """One page of the log. `last`: the sequence number to ask from next; `done`: nothing newer is there now.

    `reset`: the log ends before the number asked from, so the database is another one, or was emptied. Then there
    are no items, `last` is where that log ends, and the caller chooses: 0 reads all of it, `last` starts now.
    """

    items: tuple[Change, ...]
    last: int
    done: bool
    reset: bool = False


class OrthancChanges:
    """Reads the change log of one Orthanc. Close it with `aclose`."""

    def __init__(self, config: OrthancConfig) -> None:
        self._config = config
        self._http = OrthancHttp(config)

    async def changes_since(self, sequence: int, limit: int | None = None) -> Changes:
        """The changes after `sequence`, out of the next `limit` entries of the log (by default page_size).

        Other kinds of entries are passed over, as are studies that have been deleted since: `items` may be empty
        although `done` is false. The same `sequence` may be asked again with no harm.
        """
        where = f"{self._config.name}: changes"
        asked = self._config.page_size if limit is None else limit
        if sequence < 0 or asked < 1:
            raise Permanent(f"{where}: a sequence number is 0 or more, a limit 1 or more.")
        page = _page_of(await self._at_root(f"/changes?since={sequence}&limit={asked}", where), where)
        if not page.entries:
            return await self._end_of_log(sequence, page, where)
        _check_order(sequence, page, asked, where)
        return Changes(await self._told(page.entries), page.entries[-1].sequence, page.done)

    async def last_sequence(self) -> int:
        """The number of the newest entry, to start from now; 0 for a log that never had one."""
        where = f"{self._config.name}: last change"
        return _page_of(await self._at_root("/changes?last", where), where).last

    async def probe(self) -> str:
        """Says which Orthanc answers, or raises why none does."""
        where = f"{self._config.name}: system"
        system = await self._at_root("/system", where)
        if not isinstance(system, dict) or not isinstance(system.get("DatabaseVersion"), int):
            raise Permanent(f"{where}: this is not Orthanc. Check that url is Orthanc's REST root.")
        await self.last_sequence()
        return f"{self._config.name}: Orthanc {str(system.get('Version', 'of unknown version'))[:40]}"

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def _at_root(self, path: str, where: str) -> object:
        """What every Orthanc has: if it is missing, the settings are wrong."""
        try:
            return await self._http.get(path, where)
        except NotThere as error:
            raise Permanent(f"{where}: nothing is there (HTTP 404). Check that url is Orthanc's REST root.") from error

    async def _end_of_log(self, sequence: int, page: "_Page", where: str) -> Changes:
        # Asked for on its own: what an empty page says of `Last` differs between versions of Orthanc.
        last = await self.last_sequence()
        if last < sequence:
            return Changes((), last, done=False, reset=True)
        if not page.done:
            raise Permanent(f"{where}: the server says that there are more, and gives none.")
        return Changes((), sequence, done=True)

    async def _told(self, entries: tuple["_Entry", ...]) -> tuple[Change, ...]:
        uids: dict[str, str | None] = {}
        told = []
        for entry in entries:
            if entry.study_path and entry.study_path not in uids:
                uids[entry.study_path] = await self._study_uid(entry.study_path)
            if uid := uids.get(entry.study_path):
                told.append(Change(entry.sequence, entry.kind, uid))
        return tuple(told)

    async def _study_uid(self, path: str) -> str | None:
        """The Study Instance UID as Orthanc has it; None if the study has been deleted."""
        where = f"{self._config.name}: study of a change"
        try:
            study = await self._http.get(path, where)
        except NotThere:
            return None
        tags = study.get("MainDicomTags") if isinstance(study, dict) else None
        uid = tags.get("StudyInstanceUID") if isinstance(tags, dict) else None
        # Not only valid ones: a study with an odd UID must not hold up all that come after it.
        if not isinstance(uid, str) or not uid:
            raise Permanent(f"{where}: the answer has no Study Instance UID. Check that url is Orthanc's REST root.")
        return uid


@dataclass(frozen=True)
class _Entry:
    """An entry of the log; `study_path` is '' for the kinds that are not told."""

    sequence: int
    kind: str
    study_path: str


@dataclass(frozen=True)
class _Page:
    entries: tuple[_Entry, ...]
    last: int
    done: bool


def _page_of(answer: object, where: str) -> _Page:
    try:
        return _page(answer)
    except (TypeError, ValueError, KeyError) as error:
        raise Permanent(f"{where}: the answer is not a list of changes. Check that url is Orthanc's.") from error


def _page(answer: Any) -> _Page:
    last, done, changes = _number(answer["Last"]), answer["Done"], answer["Changes"]
    if not isinstance(done, bool) or not isinstance(changes, list):
        raise ValueError("not a page of changes")
    return _Page(tuple(_entries(changes)), last, done)


def _entries(changes: list[Any]) -> Iterator[_Entry]:
    for change in changes:
        kind, orthanc_id = change["ChangeType"], change["ID"]
        if not isinstance(kind, str) or not isinstance(orthanc_id, str):
            raise ValueError("not a change")
        template = STUDY_OF.get(kind, "")
        # It becomes part of a path.
        if template and not _ID.fullmatch(orthanc_id):
            raise ValueError("not an id of Orthanc")
        yield _Entry(_number(change["Seq"]), kind, template.format(id=orthanc_id))


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError("not a sequence number")
    return value


def _check_order(sequence: int, page: _Page, asked: int, where: str) -> None:
    """Permanent unless the page goes upwards from `sequence`: a caller that follows it must come to an end."""
    numbers = [sequence, *(entry.sequence for entry in page.entries)]
    if any(later <= earlier for earlier, later in itertools.pairwise(numbers)):
        raise Permanent(f"{where}: the sequence numbers do not rise from the one asked for.")
    if len(page.entries) > asked:
        raise Permanent(f"{where}: the server gave more than the {asked} changes asked for.")
