"""What a folder of DICOM files holds now: each file is read once, and again only when it has changed.

Remembers a short header for each file (some 10 KiB), never pixels. A file counts as unchanged while its inode, size
and time of change are the same; one that changed within the last seconds is read again in any case, for some file
systems tell the time in steps of two seconds.
"""

import os
import stat
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pydicom
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import BaseTag, Tag

from connectors.errors import Permanent

STORING = ".storing-"
_DICOM_SUFFIXES = {".dcm", ".dicom", ".ima"}
_MEDIA_DIRECTORY = "1.2.840.10008.1.3.10"
_UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
_SETTLED_AFTER_NS = 3_000_000_000


@dataclass(frozen=True)
class Skipped:
    """A file that is not used, and why. `is_dicom`: it claims to be DICOM, so something is wrong with it."""

    path: Path
    reason: str
    is_dicom: bool


@dataclass(frozen=True)
class Mark:
    """What changes when a file does. `settled`: long enough ago to be sure that the next change shows."""

    inode: int
    size: int
    mtime_ns: int
    settled: bool


@dataclass(frozen=True)
class Entry:
    """An instance in the folder, with the attributes that were asked for. Equal: the same file, unchanged."""

    path: Path
    mark: Mark
    header: Dataset = field(compare=False)


@dataclass(frozen=True)
class _Look:
    mark: Mark
    tags: frozenset[BaseTag]
    found: Entry | Skipped


class FolderScan:
    """Looks through a folder. Blocking; threads may share it."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self._lock = threading.Lock()
        self._known: dict[Path, _Look] = {}
        self._tags: frozenset[BaseTag] = frozenset(map(tag_of, _UIDS))

    def check(self) -> None:
        """Permanent unless the folder is there and can be read."""
        if not self._folder.is_dir():
            raise Permanent(f"{self._name}: {self._folder} is not a folder. Check the path.")
        if not os.access(self._folder, os.R_OK | os.X_OK):
            raise Permanent(f"{self._name}: {self._folder} may not be read. Check its rights.")

    def entries(self, tags: Iterable[BaseTag]) -> tuple[list[Entry], tuple[Skipped, ...]]:
        """Every instance by path, its header with at least these tags, and the files that are not used."""
        self.check()
        with self._lock:
            # They only grow: two callers that ask for different tags in turn must not make each other read again.
            self._tags |= frozenset(tags)
            self._known = {path: self._look(path, mark) for path, mark in sorted(_files(self._folder), key=_path)}
            found = [look.found for look in self._known.values()]
        entries = [one for one in found if isinstance(one, Entry)]
        return entries, tuple(one for one in found if isinstance(one, Skipped))

    def _look(self, path: Path, mark: Mark) -> _Look:
        known = self._known.get(path)
        if known and known.mark == mark and mark.settled and self._tags <= known.tags:
            return known
        try:
            return _Look(mark, self._tags, _read(path, mark, list(self._tags)))
        except OSError as error:
            # Rights or a share that is away: the file itself will look the same when they are back.
            failed = Skipped(path, f"unreadable: {type(error).__name__}", is_dicom=True)
            return _Look(replace(mark, settled=False), self._tags, failed)


def tag_of(name: str) -> BaseTag:
    """The tag of a DICOM keyword or of eight hexadecimal digits; Permanent for anything else."""
    tag = tag_for_keyword(name)
    if tag is not None:
        return Tag(tag)
    try:
        return Tag(int(name, 16))
    except ValueError:
        raise Permanent(f"{name!r} is neither a DICOM keyword nor a tag of eight hexadecimal digits.") from None


def _path(found: tuple[Path, Mark]) -> Path:
    return found[0]


def _files(folder: Path) -> Iterator[tuple[Path, Mark]]:
    for path in folder.rglob("*"):
        if path.name.startswith(STORING):
            continue
        try:
            status = path.stat()
        except OSError:
            # Removed since it was listed, or a link to nowhere.
            continue
        if stat.S_ISREG(status.st_mode):
            yield path, _mark(status)


def _mark(status: os.stat_result) -> Mark:
    settled = time.time_ns() - status.st_mtime_ns > _SETTLED_AFTER_NS
    return Mark(status.st_ino, status.st_size, status.st_mtime_ns, settled)


def _read(path: Path, mark: Mark, tags: Sequence[BaseTag]) -> Entry | Skipped:
    """The header of a file, or why it is not used."""
    try:
        if not _has_prefix(path):
            # A file that is named like an instance and has lost its beginning must not be passed over.
            named_so = path.suffix.lower() in _DICOM_SUFFIXES
            return Skipped(path, "not DICOM: no DICM at byte 128", is_dicom=named_so)
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(tags))
        if header.file_meta.get("MediaStorageSOPClassUID") == _MEDIA_DIRECTORY:
            return Skipped(path, "a DICOMDIR, not an instance", is_dicom=False)
        # A fifth of what would be remembered, and not asked for.
        header.file_meta = FileMetaDataset()
        missing = [name for name in _UIDS if not header.get(name)]
    except OSError:
        raise
    # A broken file can fail anywhere in the parser, and one of them must not hide the others.
    except Exception as error:
        return Skipped(path, f"unreadable: {type(error).__name__}", is_dicom=True)
    return Skipped(path, f"without {', '.join(missing)}", is_dicom=True) if missing else Entry(path, mark, header)


def _has_prefix(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"
