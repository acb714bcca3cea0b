"""WADO-RS study retrieve: streams a study from the server into one file an instance.

Runs in a thread with a synchronous client: file writes never block the event loop, and it is about
twice as fast as the asynchronous client (tests/bench/bench_fetch.py).
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import httpx

from connectors.dicomweb.config import DicomwebConfig
from connectors.dicomweb.http import Deadline, http_failures, status_error, timeouts
from connectors.dicomweb.multipart import MultipartReader, boundary_of
from connectors.dicomweb.spool import FetchedStudy, Spool, disk_error
from connectors.errors import Permanent

ACCEPT_ANY_TRANSFER_SYNTAX = 'multipart/related; type="application/dicom"; transfer-syntax=*'


class Cancelled(Exception):
    """The caller no longer wants the study; nothing of it was kept."""


class StudyRetrieve:
    """One retrieve: `run` in a thread, `cancel` from anywhere."""

    def __init__(
        self,
        http: httpx.Client,
        config: DicomwebConfig,
        study_uid: str,
        into: Path,
        on_instance: Callable[[int, int], None] | None,
    ) -> None:
        self._http = http
        self._config = config
        self._study_uid = study_uid
        self._into = into
        self._on_instance = on_instance
        self._where = f"{config.name}: retrieve of study {study_uid}"
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Ends the transfer at its next chunk."""
        self._cancelled.set()

    def run(self) -> FetchedStudy:
        """Fetches the whole study, or raises and leaves nothing behind."""
        try:
            with http_failures(self._where, self._config), self._spool() as spool, self._request() as answer:
                self._receive(answer, spool)
                return spool.commit(self._study_uid)
        except OSError as error:
            raise disk_error(error, self._into, self._where) from error

    def _spool(self) -> Spool:
        limit = self._config.max_study_bytes
        return Spool(self._into, where=self._where, max_bytes=limit, on_instance=self._on_instance)

    def _request(self) -> AbstractContextManager[httpx.Response]:
        url = f"{self._config.url}/studies/{self._study_uid}"
        accept = {"Accept": ACCEPT_ANY_TRANSFER_SYNTAX}
        return self._http.stream("GET", url, headers=accept, timeout=timeouts(self._config))

    def _receive(self, answer: httpx.Response, spool: Spool) -> None:
        self._check(answer)
        reader = MultipartReader(
            boundary_of(answer.headers.get("content-type", ""), self._where), spool, where=self._where
        )
        deadline = Deadline(self._config.study_timeout_s)
        for chunk in answer.iter_raw():
            reader.feed(chunk)
            deadline.check()
            if self._cancelled.is_set():
                raise Cancelled
            if reader.finished:
                break
        reader.close()

    def _check(self, answer: httpx.Response) -> None:
        missing = "the server does not have it. Check the Study Instance UID, or wait until the study has arrived"
        if error := status_error(answer, self._where, missing):
            raise error
        if answer.status_code == 204:
            raise Permanent(f"{self._where}: the study has no instances to retrieve (HTTP 204).")
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise Permanent(f"{self._where}: the answer is compressed although identity was asked for.")
