"""A folder of DICOM files behind the same calls as a DICOMweb server: the embedded default PACS.

Reading never changes the folder. Files that cannot be used are listed in `skipped`, never silently lost.
"""

import asyncio
import filecmp
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag, Tag

from connectors.dicomweb.matching import matches
from connectors.dicomweb.outcomes import StoreOutcome
from connectors.dicomweb.spool import FetchedStudy, Spool, disk_error
from connectors.dicomweb.uids import checked_uid
from connectors.dicomweb.upload import prepare
from connectors.errors import Permanent

DicomJson = dict[str, Any]
Progress = Callable[[int, int], None]

# What PS3.18 tables 10.6.3-3 to -5 return for each level, where the file has it.
_STUDY = (
    "StudyInstanceUID",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyID",
    "StudyDescription",
    "ReferringPhysicianName",
)
_SERIES = ("SeriesInstanceUID", "Modality", "SeriesNumber", "SeriesDescription")
_INSTANCE = ("SOPInstanceUID", "SOPClassUID", "InstanceNumber", "Rows", "Columns", "NumberOfFrames")
_STORING = ".storing-"
_DICOM_SUFFIXES = {".dcm", ".dicom", ".ima"}
_MEDIA_DIRECTORY = "1.2.840.10008.1.3.10"
_NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class Skipped:
    """A file that is not used, and why. `is_dicom`: it claims to be DICOM, so something is wrong with it."""

    path: Path
    reason: str
    is_dicom: bool


@dataclass(frozen=True)
class _Entry:
    path: Path
    header: Dataset


class FolderClient:
    """Searches, fetches from and stores to a folder. `skipped` tells of the last look through it."""

    def __init__(self, folder: Path, *, name: str = "folder") -> None:
        self._folder = folder
        self._name = name
        self.skipped: tuple[Skipped, ...] = ()

    async def search_studies(self, filters: Mapping[str, str], *, include: Sequence[str] = ()) -> list[DicomJson]:
        """Studies that match, as DICOM JSON with ModalitiesInStudy and the counts; none is an empty list."""
        wanted = {"Modality" if name == "ModalitiesInStudy" else name: value for name, value in filters.items()}
        found = {entry.header.StudyInstanceUID for entry in await self._search(_STUDY, wanted, include)}
        groups = _grouped(await self._search(_STUDY, {}, include), "StudyInstanceUID") if found else []
        return [_study_json(group, include) for group in groups if group[0].header.StudyInstanceUID in found]

    async def search_series(
        self, study_uid: str, filters: Mapping[str, str] | None = None, *, include: Sequence[str] = ()
    ) -> list[DicomJson]:
        """Series of one study that match."""
        wanted = {**(filters or {}), "StudyInstanceUID": checked_uid(study_uid, "Study Instance UID")}
        entries = await self._search(_SERIES, wanted, include)
        names = ["StudyInstanceUID", *_SERIES, *include]
        return [_json(group[0].header, names) for group in _grouped(entries, "SeriesInstanceUID")]

    async def search_instances(
        self,
        study_uid: str,
        filters: Mapping[str, str] | None = None,
        *,
        series_uid: str | None = None,
        include: Sequence[str] = (),
    ) -> list[DicomJson]:
        """Instances of one study, or of one of its series, that match."""
        wanted = {**(filters or {}), "StudyInstanceUID": checked_uid(study_uid, "Study Instance UID")}
        if series_uid is not None:
            wanted["SeriesInstanceUID"] = checked_uid(series_uid, "Series Instance UID")
        entries = await self._search(_INSTANCE, wanted, include)
        names = ["StudyInstanceUID", "SeriesInstanceUID", *_INSTANCE, *include]
        return [_json(group[0].header, names) for group in _grouped(entries, "SOPInstanceUID")]

    async def present(self, study_uid: str, sop_instance_uids: Sequence[str]) -> set[str]:
        """Which of these instances the folder has in this study."""
        entries = await self._search(_INSTANCE, {"StudyInstanceUID": study_uid}, ())
        return set(sop_instance_uids) & {str(entry.header.SOPInstanceUID) for entry in entries}

    async def fetch_study(self, study_uid: str, into: Path, *, on_progress: Progress | None = None) -> FetchedStudy:
        """Puts every instance of the study into the folder `into`, as hard links where the disk allows.

        A hard link is the original file: read it, do not write to it. Files with equal bytes are taken once;
        different files under one SOP Instance UID are all taken, so that whoever reads them sees the conflict.
        """
        entries = await self._search(_INSTANCE, {"StudyInstanceUID": checked_uid(study_uid, "Study Instance UID")}, ())
        if not entries:
            raise Permanent(f"{self._name}: {self._folder} holds no instance of study {study_uid}.")
        paths = _without_copies(entries)
        fetched = await asyncio.to_thread(self._link_all, study_uid, paths, into)
        if on_progress:
            on_progress(len(fetched.files), fetched.bytes_received)
        return fetched

    async def store(self, instances: Sequence[Path | bytes], study_uid: str) -> tuple[StoreOutcome, ...]:
        """Writes each instance to `<study UID>/<SOP Instance UID>.dcm`, whole or not at all.

        An instance that is there already stays as it is, with a warning if the new bytes differ.
        """
        where = f"{self._name}: store in study {checked_uid(study_uid, 'Study Instance UID')}"
        upload = await asyncio.to_thread(prepare, instances, study_uid, "", where)
        there = {str(e.header.SOPInstanceUID): e.path for e in await self._search(_INSTANCE, {}, ())}
        pairs = zip(upload.instances, upload.sop_instance_uids, strict=True)
        return tuple([await asyncio.to_thread(self._store_one, one, uid, study_uid, there) for one, uid in pairs])

    async def probe(self) -> str:
        """Says that the folder can be read."""
        await asyncio.to_thread(self._check_folder)
        return f"{self._name}: {self._folder} can be read"

    async def aclose(self) -> None:
        """Nothing to close."""

    async def _search(self, level: Sequence[str], filters: Mapping[str, str], include: Sequence[str]) -> list[_Entry]:
        tags = [_tag(name) for name in [*_STUDY, *_SERIES, *_INSTANCE, *level, *filters, *include]]
        entries, self.skipped = await asyncio.to_thread(self._scan, tags)
        wanted = [(_tag(name), value) for name, value in filters.items()]
        return [entry for entry in entries if all(matches(entry.header, tag, value) for tag, value in wanted)]

    def _check_folder(self) -> None:
        if not self._folder.is_dir():
            raise Permanent(f"{self._name}: {self._folder} is not a folder. Check the path.")
        if not os.access(self._folder, os.R_OK | os.X_OK):
            raise Permanent(f"{self._name}: {self._folder} may not be read. Check its rights.")

    def _scan(self, tags: Sequence[BaseTag]) -> tuple[list[_Entry], tuple[Skipped, ...]]:
        self._check_folder()
        files = (path for path in self._folder.rglob("*") if path.is_file() and not path.name.startswith(_STORING))
        found = [_look_at(path, tags) for path in sorted(files)]
        entries = [one for one in found if isinstance(one, _Entry)]
        return entries, tuple(one for one in found if isinstance(one, Skipped))

    def _link_all(self, study_uid: str, paths: Sequence[Path], into: Path) -> FetchedStudy:
        where = f"{self._name}: fetch of study {study_uid}"
        try:
            with Spool(into, where=where, max_bytes=_NO_LIMIT) as spool:
                for path in paths:
                    origin = "__".join(path.relative_to(self._folder).parts)
                    _link_or_copy(path, spool.next_path(origin))
                    spool.count(path.stat().st_size)
                return spool.commit(study_uid)
        except OSError as error:
            raise disk_error(error, into, where) from error

    def _store_one(self, instance: Path | bytes, uid: str, study_uid: str, there: Mapping[str, Path]) -> StoreOutcome:
        content = instance if isinstance(instance, bytes) else instance.read_bytes()
        if uid in there:
            same = there[uid].read_bytes() == content
            warning = "" if same else "an instance with this UID and other content is there already; it was kept"
            return StoreOutcome(uid, stored=True, warning=warning)
        folder = self._folder / study_uid
        try:
            folder.mkdir(exist_ok=True)
            _write_whole(folder / f"{uid}.dcm", content)
        except OSError as error:
            raise disk_error(error, folder, f"{self._name}: store") from error
        return StoreOutcome(uid, stored=True)


def _tag(name: str) -> BaseTag:
    tag = tag_for_keyword(name)
    if tag is not None:
        return Tag(tag)
    try:
        return Tag(int(name, 16))
    except ValueError:
        raise Permanent(f"{name!r} is neither a DICOM keyword nor a tag of eight hexadecimal digits.") from None


def _look_at(path: Path, tags: Sequence[BaseTag]) -> _Entry | Skipped:
    """The header of a file, or why it is not used."""
    try:
        if not _has_prefix(path):
            # A file that is named like an instance and has lost its beginning must not be passed over.
            named_so = path.suffix.lower() in _DICOM_SUFFIXES
            return Skipped(path, "not DICOM: no DICM at byte 128", is_dicom=named_so)
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(tags))
        if header.file_meta.get("MediaStorageSOPClassUID") == _MEDIA_DIRECTORY:
            return Skipped(path, "a DICOMDIR, not an instance", is_dicom=False)
        missing = [n for n in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID") if not header.get(n)]
    # A broken file can fail anywhere in the parser, and one of them must not hide the others.
    except Exception as error:
        return Skipped(path, f"unreadable: {type(error).__name__}", is_dicom=True)
    return Skipped(path, f"without {', '.join(missing)}", is_dicom=True) if missing else _Entry(path, header)


def _has_prefix(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _grouped(entries: Iterable[_Entry], keyword: str) -> list[list[_Entry]]:
    groups: dict[str, list[_Entry]] = {}
    for entry in entries:
        groups.setdefault(str(entry.header[keyword].value), []).append(entry)
    return list(groups.values())


def _json(header: Dataset, names: Sequence[str]) -> DicomJson:
    chosen = Dataset()
    for name in names:
        if _tag(name) in header:
            chosen[_tag(name)] = header[_tag(name)]
    # A value that breaks its own VR is left out here; whoever fetches the instance sees it.
    return chosen.to_json_dict(suppress_invalid_tags=True)


def _study_json(group: Sequence[_Entry], include: Sequence[str]) -> DicomJson:
    """One study with the attributes that a server counts up (PS3.18 table 10.6.3-3)."""
    counted = Dataset()
    counted.ModalitiesInStudy = sorted({str(entry.header.get("Modality", "")) for entry in group} - {""})
    counted.NumberOfStudyRelatedSeries = len({entry.header.SeriesInstanceUID for entry in group})
    counted.NumberOfStudyRelatedInstances = len({entry.header.SOPInstanceUID for entry in group})
    return {**_json(group[0].header, [*_STUDY, *include]), **counted.to_json_dict()}


def _without_copies(entries: Sequence[_Entry]) -> list[Path]:
    """One path for each content: two files of one SOP Instance UID with equal bytes are one instance."""
    kept: list[Path] = []
    for group in _grouped(entries, "SOPInstanceUID"):
        distinct: list[Path] = []
        for entry in group:
            if not any(filecmp.cmp(entry.path, other, shallow=False) for other in distinct):
                distinct.append(entry.path)
        kept += distinct
    return sorted(kept)


def _link_or_copy(source: Path, target: str) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:
        # Another disk, a file system without links, or a file of another owner.
        shutil.copyfile(source, target)


def _write_whole(path: Path, content: bytes) -> None:
    """The file appears under its name only when all of it is on the disk."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=_STORING, delete=False) as file:
        try:
            shutil.copyfileobj(BytesIO(content), file)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
