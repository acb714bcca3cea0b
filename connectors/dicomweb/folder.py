"""A folder of DICOM files behind the same calls as a DICOMweb server: the embedded default PACS.

Reading never changes the folder. Files that cannot be used are listed in `skipped`, never silently lost.
"""

import asyncio
import filecmp
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path

from pydicom.dataset import Dataset

from connectors.dicomweb.headers import Headers
from connectors.dicomweb.matching import matches
from connectors.dicomweb.metadata import DicomJson, each_once
from connectors.dicomweb.outcomes import StoreOutcome
from connectors.dicomweb.scan import STORING, Entry, FolderScan, Skipped, tag_of
from connectors.dicomweb.spool import FetchedStudy, Spool, disk_error
from connectors.dicomweb.uids import checked_uid
from connectors.dicomweb.upload import prepare
from connectors.errors import NotThere

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
# Counted up over the files, and never read from one of them.
_COUNTED = (
    "ModalitiesInStudy",
    "NumberOfStudyRelatedSeries",
    "NumberOfStudyRelatedInstances",
    "NumberOfSeriesRelatedInstances",
)
_COUNTED_TAGS = frozenset(map(tag_of, _COUNTED))
_NO_LIMIT = 1 << 62


class FolderClient:
    """Searches, fetches from and stores to a folder, which may change while it is watched.

    Every call looks through the folder anew, and reads only what is new or changed. `skipped` tells of the last look.
    """

    def __init__(self, folder: Path, *, name: str = "folder") -> None:
        self._folder = folder
        self._name = name
        self._scan = FolderScan(folder, name)
        self._headers = Headers()
        self.skipped: tuple[Skipped, ...] = ()

    async def search_studies(self, filters: Mapping[str, str], *, include: Sequence[str] = ()) -> list[DicomJson]:
        """Studies that match, as DICOM JSON with ModalitiesInStudy and the counts; none is an empty list."""
        wanted = {"Modality" if name == "ModalitiesInStudy" else name: value for name, value in filters.items()}
        entries = await self._look([*wanted, *include])
        found = {entry.header.StudyInstanceUID for entry in _matching(entries, wanted)}
        groups = _grouped(entries, "StudyInstanceUID")
        return [_study_json(group, include) for group in groups if group[0].header.StudyInstanceUID in found]

    async def search_series(
        self, study_uid: str, filters: Mapping[str, str] | None = None, *, include: Sequence[str] = ()
    ) -> list[DicomJson]:
        """Series of one study that match, each with the number of its instances."""
        wanted = {**(filters or {}), "StudyInstanceUID": checked_uid(study_uid, "Study Instance UID")}
        entries = await self._search(wanted, include)
        return [_series_json(group, include) for group in _grouped(entries, "SeriesInstanceUID")]

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
        entries = await self._search(wanted, include)
        names = ["StudyInstanceUID", "SeriesInstanceUID", *_INSTANCE, *include]
        return [_json(group[0].header, names) for group in _grouped(entries, "SOPInstanceUID")]

    async def present(self, study_uid: str, sop_instance_uids: Sequence[str]) -> set[str]:
        """Which of these instances the folder has in this study."""
        entries = await self._search({"StudyInstanceUID": study_uid})
        return set(sop_instance_uids) & {str(entry.header.SOPInstanceUID) for entry in entries}

    async def retrieve_metadata(self, study_uid: str, series_uid: str) -> list[DicomJson]:
        """The data set of every instance of one series, as DICOM JSON without pixels and large binary elements.

        Private elements that a server would give as bulk data are inside, up to 3 KiB. Different headers under one
        SOP Instance UID are all given. Raises NotThere if the folder does not have the series (any more).
        """
        study, series = checked_uid(study_uid, "Study Instance UID"), checked_uid(series_uid, "Series Instance UID")
        entries = await self._search({"StudyInstanceUID": study, "SeriesInstanceUID": series})
        headers = await asyncio.to_thread(lambda: [self._headers.of(entry) for entry in entries])
        found = each_once(header for header in headers if header is not None)
        if not found:
            raise NotThere(f"{self._name}: {self._folder} holds no instance of series {series} (any more).")
        return found

    async def fetch_study(self, study_uid: str, into: Path, *, on_progress: Progress | None = None) -> FetchedStudy:
        """Puts every instance of the study into the folder `into`, as hard links where the disk allows.

        A hard link is the original file: read it, do not write to it. Files with equal bytes are taken once;
        different files under one SOP Instance UID are all taken, so that whoever reads them sees the conflict.
        """
        entries = await self._search({"StudyInstanceUID": checked_uid(study_uid, "Study Instance UID")})
        if not entries:
            raise NotThere(f"{self._name}: {self._folder} holds no instance of study {study_uid}.")
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
        there = {str(e.header.SOPInstanceUID): e.path for e in await self._look()}
        pairs = zip(upload.instances, upload.sop_instance_uids, strict=True)
        return tuple([await asyncio.to_thread(self._store_one, one, uid, study_uid, there) for one, uid in pairs])

    async def probe(self) -> str:
        """Says that the folder can be read."""
        await asyncio.to_thread(self._scan.check)
        return f"{self._name}: {self._folder} can be read"

    async def aclose(self) -> None:
        """Nothing to close."""

    async def _search(self, filters: Mapping[str, str], include: Sequence[str] = ()) -> list[Entry]:
        return _matching(await self._look([*filters, *include]), filters)

    async def _look(self, names: Sequence[str] = ()) -> list[Entry]:
        """All instances that are in the folder now, their headers with these attributes too."""
        tags = frozenset(tag_of(name) for name in [*_STUDY, *_SERIES, *_INSTANCE, *names]) - _COUNTED_TAGS
        entries, self.skipped = await asyncio.to_thread(self._scan.entries, tags)
        return entries

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


def _matching(entries: Iterable[Entry], filters: Mapping[str, str]) -> list[Entry]:
    wanted = [(tag_of(name), value) for name, value in filters.items()]
    return [entry for entry in entries if all(matches(entry.header, tag, value) for tag, value in wanted)]


def _grouped(entries: Iterable[Entry], keyword: str) -> list[list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(str(entry.header[keyword].value), []).append(entry)
    return list(groups.values())


def _json(header: Dataset, names: Sequence[str]) -> DicomJson:
    chosen = Dataset()
    for name in names:
        if tag_of(name) in header:
            chosen[tag_of(name)] = header[tag_of(name)]
    # A value that breaks its own VR is left out here; whoever fetches the instance sees it.
    return chosen.to_json_dict(suppress_invalid_tags=True)


def _study_json(group: Sequence[Entry], include: Sequence[str]) -> DicomJson:
    """One study with the attributes that a server counts up (PS3.18 table 10.6.3-3)."""
    counted = Dataset()
    counted.ModalitiesInStudy = sorted({str(entry.header.get("Modality", "")) for entry in group} - {""})
    counted.NumberOfStudyRelatedSeries = len({entry.header.SeriesInstanceUID for entry in group})
    counted.NumberOfStudyRelatedInstances = len({entry.header.SOPInstanceUID for entry in group})
    return {**_json(group[0].header, [*_STUDY, *include]), **counted.to_json_dict()}


def _series_json(group: Sequence[Entry], include: Sequence[str]) -> DicomJson:
    counted = Dataset()
    counted.NumberOfSeriesRelatedInstances = len({entry.header.SOPInstanceUID for entry in group})
    names = ["StudyInstanceUID", *_SERIES, *include]
    return {**_json(group[0].header, names), **counted.to_json_dict()}


def _without_copies(entries: Sequence[Entry]) -> list[Path]:
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
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=STORING, delete=False) as file:
        try:
            shutil.copyfileobj(BytesIO(content), file)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
