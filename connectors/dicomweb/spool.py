"""A folder of instances that is either whole or not there: filled under another name, renamed at the end."""

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

from connectors.errors import ConnectorError, Permanent, Retryable

ABANDONED_AFTER_S = 24 * 3600
_MAX_ORIGIN = 150
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class FetchedStudy:
    """A study on disk: its instances in the order in which they came, and how many bytes they hold."""

    study_uid: str
    folder: Path
    files: tuple[Path, ...]
    bytes_received: int


def disk_error(error: OSError, folder: Path, where: str) -> ConnectorError:
    """The connector error for a failed write: a full disk may be freed, a wrong folder must be corrected."""
    if error.errno in _FULL:
        return Retryable(f"{where}: the disk of {folder} is full. Free space there; nothing partial was kept.")
    reason = os.strerror(error.errno) if error.errno else str(error)
    return Permanent(f"{where}: cannot write to {folder}: {reason}. Correct the folder or its rights.")


class Spool:
    """Collects one study in a folder beside `into`; `commit` renames it to `into`, leaving early removes it.

    As a multipart sink it writes each part to `000001.dcm`, `000002.dcm` and so on, without reading DICOM.
    A folder that is at `into` already (an earlier fetch of the same study) is replaced by the new one.
    """

    def __init__(
        self,
        into: Path,
        *,
        where: str,
        max_bytes: int,
        on_instance: Callable[[int, int], None] | None = None,
    ) -> None:
        self._into = into
        self._where = where
        self._max_bytes = max_bytes
        self._on_instance = on_instance
        self._partial = ""
        self._file: FileIO | None = None
        self._names: list[str] = []
        self.bytes_received = 0

    @property
    def instances(self) -> int:
        """How many instances were begun."""
        return len(self._names)

    def __enter__(self) -> Self:
        self._into.parent.mkdir(parents=True, exist_ok=True)
        self._remove_abandoned()
        self._partial = tempfile.mkdtemp(prefix=self._mark, dir=self._into.parent)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        shutil.rmtree(self._partial, ignore_errors=True)

    @property
    def _mark(self) -> str:
        return f".{self._into.name}.partial-"

    def _remove_abandoned(self) -> None:
        """Drops what a killed process left of the same study, once it is surely not being written any more."""
        for name in os.listdir(self._into.parent):
            if name.startswith(self._mark):
                old = self._into.parent / name
                if time.time() - old.stat().st_mtime > ABANDONED_AFTER_S:
                    shutil.rmtree(old, ignore_errors=True)

    def next_path(self, origin: str = "") -> str:
        """The path of the next instance, in the partial folder. `origin` becomes part of the name, so that whoever
        finds something wrong with the instance can say which file it was."""
        mark = f"-{origin.removesuffix('.dcm')[-_MAX_ORIGIN:]}" if origin else ""
        self._names.append(f"{self.instances + 1:06d}{mark}.dcm")
        return f"{self._partial}{os.sep}{self._names[-1]}"

    def _close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None

    def begin(self, headers: Mapping[str, str]) -> None:
        kind = headers.get("content-type", "application/dicom").split(";")[0].strip().lower()
        if kind != "application/dicom":
            raise Permanent(
                f"{self._where}: part {self.instances + 1} is {kind!r}, not application/dicom. "
                "The server does not honour the Accept header of WADO-RS."
            )
        self._file = FileIO(self.next_path(), "w")

    def data(self, piece: memoryview) -> None:
        self.count(len(piece))
        while self._file and piece.nbytes:
            piece = piece[self._file.write(piece) or 0 :]

    def end(self) -> None:
        self._close()
        if self._on_instance:
            self._on_instance(self.instances, self.bytes_received)

    def count(self, size: int) -> None:
        """Adds to the bytes received; Permanent once the study is larger than the setting allows."""
        self.bytes_received += size
        if self.bytes_received > self._max_bytes:
            raise Permanent(
                f"{self._where}: the study is larger than max_study_bytes ({self._max_bytes}). "
                "Raise that setting if studies of this size are meant to be read."
            )

    def commit(self, study_uid: str) -> FetchedStudy:
        """Gives the whole study its final name. A study without instances is refused."""
        if not self.instances:
            raise Permanent(f"{self._where}: the study has no instances to retrieve.")
        self._take_place()
        files = tuple(self._into / name for name in self._names)
        return FetchedStudy(study_uid, self._into, files, self.bytes_received)

    def _take_place(self) -> None:
        if self._into.exists():
            # Renamed aside first: rename() cannot replace a folder that holds files.
            aside = Path(f"{self._partial}-replaced")
            self._into.rename(aside)
            Path(self._partial).rename(self._into)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            Path(self._partial).rename(self._into)
