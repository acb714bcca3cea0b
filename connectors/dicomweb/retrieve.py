"""WADO-RS study retrieve: streams a study from the server into one file an instance.

Runs in a thread: neither the socket nor the disk blocks the event loop.
"""

import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from connectors.dicomweb.config import DicomwebConfig
from connectors.dicomweb.download import Download
from connectors.dicomweb.http import not_there, status_error
from connectors.dicomweb.multipart import MultipartReader, boundary_of
from connectors.dicomweb.spool import FetchedStudy, Spool, disk_error
from connectors.errors import Permanent, Retryable

ACCEPT_ANY_TRANSFER_SYNTAX = 'multipart/related; type="application/dicom"; transfer-syntax=*'


class Cancelled(Exception):
    """The caller no longer wants the study; nothing of it was kept."""


class StudyRetrieve:
    """One retrieve: `run` in a thread, `cancel` from anywhere."""

    def __init__(
        self,
        config: DicomwebConfig,
        study_uid: str,
        into: Path,
        on_instance: Callable[[int, int], None] | None,
    ) -> None:
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
            with self._spool() as spool, closing(self._request()) as answer:
                self._receive(answer, spool)
                return spool.commit(self._study_uid)
        except OSError as error:
            raise disk_error(error, self._into, self._where) from error

    def _spool(self) -> Spool:
        limit = self._config.max_study_bytes
        return Spool(self._into, where=self._where, max_bytes=limit, on_instance=self._on_instance)

    def _request(self) -> Download:
        accept = {"Accept": ACCEPT_ANY_TRANSFER_SYNTAX}
        return Download(self._config, f"/studies/{self._study_uid}", accept, self._where)

    def _receive(self, answer: Download, spool: Spool) -> None:
        self._check(answer)
        boundary = boundary_of(answer.headers.get("content-type", ""), self._where)
        reader = MultipartReader(boundary, spool, where=self._where)
        ends = time.monotonic() + self._config.study_timeout_s
        for piece in answer.pieces():
            reader.feed(piece)
            if self._cancelled.is_set():
                raise Cancelled
            if reader.finished:
                break
            if time.monotonic() > ends:
                raise Retryable(f"{self._where}: not done within study_timeout_s={self._config.study_timeout_s:g}.")
        reader.close()

    def _check(self, answer: Download) -> None:
        missing = "the server does not have it. Check the Study Instance UID, or wait until the study has arrived"
        if gone := not_there(answer.status, self._where, missing):
            raise gone
        if error := status_error(answer.status, answer.headers, self._where, missing):
            raise error
        if answer.status == 204:
            raise Permanent(f"{self._where}: the study has no instances to retrieve (HTTP 204).")
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise Permanent(f"{self._where}: the answer is compressed although identity was asked for.")
