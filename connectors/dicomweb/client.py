"""A DICOMweb server as asyncio calls: QIDO-RS search, WADO-RS study retrieve, STOW-RS store (DICOM PS3.18).

Nothing is retried here: Retryable says that the caller may, and after how long.
"""

import asyncio
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from connectors.dicomweb.config import DicomwebConfig
from connectors.dicomweb.http import http_failures, not_there, open_client, status_error, timeouts
from connectors.dicomweb.metadata import (
    SERIES_UID,
    SOP_UID,
    STUDY_UID,
    DicomJson,
    data_sets_of,
    of_series,
    value_of,
)
from connectors.dicomweb.outcomes import StoreOutcome, not_mentioned, outcomes_of
from connectors.dicomweb.retrieve import StudyRetrieve
from connectors.dicomweb.spool import FetchedStudy
from connectors.dicomweb.uids import checked_uid
from connectors.dicomweb.upload import Upload, prepare
from connectors.errors import NotThere, Permanent

Progress = Callable[[int, int], None]

# Statuses under which PS3.18 10.5.3 (and Orthanc: 400) still tells the outcome of every instance.
_STORE_ANSWERS = (200, 202, 400, 409)
_MAX_SINGLE_LOOKUPS = 16


class DicomwebClient:
    """Talks to one DICOMweb server. Close it with `aclose`."""

    def __init__(self, config: DicomwebConfig) -> None:
        self._config = config
        self._http = open_client(config)

    async def search_studies(self, filters: Mapping[str, str], *, include: Sequence[str] = ()) -> list[DicomJson]:
        """Studies that match, as DICOM JSON; none is an empty list. `filters` by keyword or tag."""
        return await self._search("studies", STUDY_UID, filters, include)

    async def search_series(
        self, study_uid: str, filters: Mapping[str, str] | None = None, *, include: Sequence[str] = ()
    ) -> list[DicomJson]:
        """Series of one study that match."""
        study = checked_uid(study_uid, "Study Instance UID")
        return await self._search(f"studies/{study}/series", SERIES_UID, filters or {}, include)

    async def search_instances(
        self,
        study_uid: str,
        filters: Mapping[str, str] | None = None,
        *,
        series_uid: str | None = None,
        include: Sequence[str] = (),
    ) -> list[DicomJson]:
        """Instances of one study, or of one of its series, that match."""
        path = f"studies/{checked_uid(study_uid, 'Study Instance UID')}"
        if series_uid is not None:
            path += f"/series/{checked_uid(series_uid, 'Series Instance UID')}"
        return await self._search(f"{path}/instances", SOP_UID, filters or {}, include)

    async def present(self, study_uid: str, sop_instance_uids: Sequence[str]) -> set[str]:
        """Which of these instances the server has in this study."""
        wanted = set(sop_instance_uids)
        if len(wanted) > _MAX_SINGLE_LOOKUPS:
            matches = await self.search_instances(study_uid)
        else:
            found = [await self.search_instances(study_uid, {"SOPInstanceUID": uid}) for uid in sorted(wanted)]
            matches = [match for some in found for match in some]
        # A server may ignore a filter that it does not know: only what was asked for counts.
        return wanted & {value_of(match, SOP_UID) for match in matches}

    async def retrieve_metadata(self, study_uid: str, series_uid: str) -> list[DicomJson]:
        """The data set of every instance of one series, as DICOM JSON (PS3.18 10.4, RetrieveMetadata).

        What the server keeps as bulk data (pixels, and with Orthanc every OB, OW and UN element, be it two bytes
        long) is left out; no BulkDataURI is followed. Two data sets under one SOP Instance UID are both given.
        Raises NotThere if the server does not have the series (any more), Permanent, Retryable.
        """
        study, series = checked_uid(study_uid, "Study Instance UID"), checked_uid(series_uid, "Series Instance UID")
        where = f"{self._config.name}: metadata of series {series}"
        answer, body = await self._get(f"studies/{study}/series/{series}/metadata", {}, where)
        missing = "the server does not have it (any more). Check the UIDs"
        if gone := not_there(answer.status_code, where, missing):
            raise gone
        if error := status_error(answer.status_code, answer.headers, where, missing):
            raise error
        found = await asyncio.to_thread(of_series, body, study, series, where)
        if not found:
            raise NotThere(f"{where}: the server lists no instance of it (any more).")
        return found

    async def fetch_study(self, study_uid: str, into: Path, *, on_progress: Progress | None = None) -> FetchedStudy:
        """Fetches the whole study into the folder `into`, one file an instance, or leaves nothing.

        Memory stays within a few chunks whatever the size. `on_progress(instances, bytes)` is called on the
        event loop. Raises Permanent (not there, not allowed, no multipart), Retryable (busy, cut off, disk full).
        """
        retrieve = StudyRetrieve(
            self._config,
            checked_uid(study_uid, "Study Instance UID"),
            into,
            _on_this_loop(on_progress),
        )
        try:
            return await asyncio.to_thread(retrieve.run)
        except asyncio.CancelledError:
            retrieve.cancel()
            raise

    async def store(self, instances: Sequence[Path | bytes], study_uid: str) -> tuple[StoreOutcome, ...]:
        """Sends instances to the study, and says of each one what became of it, in the order given.

        A silent server is Retryable even after everything was sent: an instance keeps its SOP Instance UID, so a
        PACS that took it the first time has it once. Ask `present` first to spare the repetition.
        """
        where = f"{self._config.name}: store in study {checked_uid(study_uid, 'Study Instance UID')}"
        upload = await asyncio.to_thread(prepare, instances, study_uid, uuid.uuid4().hex, where)
        with http_failures(where, self._config):
            answer, body = await self._post(study_uid, upload, where)
        outcomes = outcomes_of(body, upload.sop_instance_uids) if answer.status_code in _STORE_ANSWERS else None
        if outcomes is not None:
            return outcomes
        if error := status_error(
            answer.status_code, answer.headers, where, "the server offers no STOW-RS here. Check url"
        ):
            raise error
        return tuple(not_mentioned(uid) for uid in upload.sop_instance_uids)

    async def probe(self) -> str:
        """Says that QIDO-RS answers, or raises why it does not."""
        await self._page("studies", {"limit": "1"})
        return f"{self._config.name}: DICOMweb answers at {self._config.url}"

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def _post(self, study_uid: str, upload: Upload, where: str) -> tuple[httpx.Response, bytes]:
        request = self._http.build_request(
            "POST",
            f"{self._config.url}/studies/{study_uid}",
            content=upload.body(),
            headers={
                "Content-Type": upload.content_type,
                "Content-Length": str(upload.content_length),
                "Accept": "application/dicom+json",
            },
            timeout=timeouts(self._config, read_s=self._config.store_timeout_s),
        )
        return await self._exchange(request, where)

    async def _exchange(self, request: httpx.Request, where: str) -> tuple[httpx.Response, bytes]:
        """The answer with its body, which is read only as far as max_json_bytes allows."""
        answer = await self._http.send(request, stream=True)
        body = bytearray()
        try:
            async for chunk in answer.aiter_bytes():
                body += chunk
                if len(body) > self._config.max_json_bytes:
                    raise Permanent(f"{where}: the answer is larger than max_json_bytes.")
        finally:
            await answer.aclose()
        return answer, bytes(body)

    async def _search(
        self, path: str, level_uid: str, filters: Mapping[str, str], include: Sequence[str]
    ) -> list[DicomJson]:
        """All pages of one search, each match once."""
        query: dict[str, Any] = {**filters, "limit": str(self._config.page_size)}
        if include:
            query["includefield"] = list(include)
        matches: dict[str, DicomJson] = {}
        more = True
        while more:
            page, more = await self._page(path, {**query, "offset": str(len(matches))})
            known = len(matches)
            matches.update((value_of(match, level_uid) or f"#{known + n}", match) for n, match in enumerate(page))
            more = bool(page) and (more or len(page) >= self._config.page_size)
            if more and len(matches) == known:
                return self._without_paging(page, list(matches.values()))
            self._check_amount(len(matches))
        return list(matches.values())

    def _without_paging(self, page: list[DicomJson], matches: list[DicomJson]) -> list[DicomJson]:
        """All matches, if the server ignores `limit` as it ignores `offset`; otherwise some would be missed."""
        if len(page) <= self._config.page_size:
            raise Permanent(
                f"{self._config.name}: a search has more than page_size ({self._config.page_size}) matches and "
                "the server does not page. Raise that setting."
            )
        return matches

    def _check_amount(self, matches: int) -> None:
        if matches > self._config.max_results:
            raise Permanent(
                f"{self._config.name}: a search matches more than max_results ({self._config.max_results}). "
                "Ask for less, or raise that setting."
            )

    async def _page(self, path: str, query: Mapping[str, Any]) -> tuple[list[DicomJson], bool]:
        """One page of matches, and whether the server warns that there are more (PS3.18 8.3.4.4)."""
        where = f"{self._config.name}: search of {path.rpartition('/')[2]}"
        answer, body = await self._get(path, query, where)
        if error := status_error(
            answer.status_code, answer.headers, where, "nothing answers at this address. Check url"
        ):
            raise error
        more = answer.headers.get("warning", "").startswith("299")
        return ([] if answer.status_code == 204 else data_sets_of(body, where)), more

    async def _get(self, path: str, query: Mapping[str, Any], where: str) -> tuple[httpx.Response, bytes]:
        """The answer to one GET for DICOM JSON, whatever its status, within query_timeout_s in all."""
        request = self._http.build_request(
            "GET",
            f"{self._config.url}/{path}",
            params=query,
            headers={"Accept": "application/dicom+json"},
            timeout=timeouts(self._config),
        )
        with http_failures(where, self._config):
            async with asyncio.timeout(self._config.query_timeout_s):
                return await self._exchange(request, where)


def _on_this_loop(on_progress: Progress | None) -> Progress | None:
    """`on_progress` for use in another thread: it is called on the loop that is running now."""
    if on_progress is None:
        return None
    loop = asyncio.get_running_loop()

    def report(instances: int, size: int) -> None:
        loop.call_soon_threadsafe(on_progress, instances, size)

    return report
