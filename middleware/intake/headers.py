"""The headers of a study as the PACS has them now: enough to choose series and check geometry, without its pixels."""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable, Sequence

from pydicom.dataset import Dataset

from connectors.errors import Permanent
from mappings.inputs.dicom_json import DicomJson, first_value
from mappings.inputs.dicom_to_study import HEADER_TAGS, datasets_to_study
from mappings.model.study import Study
from mappings.reading.series_to_roles import NON_IMAGE_MODALITIES
from middleware.ports import ImageArchive

KEPT_INSTANCES = 10_000
"""Headers that are remembered of all series together, some 10 KiB each."""
_SERIES_UID, _MODALITY, _INSTANCES = "0020000E", "00080060", "00201209"


class Headers:
    """Asks a PACS for headers; a series whose number of instances did not change is not asked for again."""

    def __init__(self, pacs: ImageArchive) -> None:
        self._pacs = pacs
        self._kept: OrderedDict[tuple[str, str], tuple[str, list[Dataset]]] = OrderedDict()

    async def study(
        self, study_uid: str, *, anew: bool = False, is_wanted: Callable[[Study], bool] = lambda _: True
    ) -> Study | None:
        """The study, None where the PACS has nothing of it. Where `is_wanted` says no to what the search of its series
        tells (modalities above all), that is all: a CT of thousands of slices costs one question. `anew`: ask for
        everything, since a value may have been corrected. Raises as the connector does."""
        series = await self._series(study_uid)
        outline = _study_of_outlines(study_uid, series)
        if outline is None or not is_wanted(outline):
            return outline
        pairs: list[tuple[str, Dataset]] = []
        for one in (one for one in series if _is_of_images(one)):
            for number, header in enumerate(await self._headers(study_uid, one, anew)):
                pairs.append((f"{first_value(one, _SERIES_UID)}/{number}", header))
        whose = pairs[0][1] if pairs else None
        for one in (one for one in series if not _is_of_images(one)):
            pairs.append((first_value(one, _SERIES_UID), outline_beside(whose, study_uid, one)))
        return await asyncio.to_thread(datasets_to_study, pairs) if pairs else None

    async def outline(self, study_uid: str) -> Study | None:
        """What the search of its series tells of a study, with one instance that stands for each."""
        return _study_of_outlines(study_uid, await self._series(study_uid))

    async def _series(self, study_uid: str) -> list[DicomJson]:
        found = await self._pacs.search_series(study_uid, {}, include=("Modality", "NumberOfSeriesRelatedInstances"))
        return [one for one in found if first_value(one, _SERIES_UID)]

    async def _headers(self, study_uid: str, series: DicomJson, anew: bool) -> list[Dataset]:
        """The headers of one series."""
        uid, count = first_value(series, _SERIES_UID), first_value(series, _INSTANCES)
        key = (study_uid, uid)
        if not anew and count and key in self._kept and self._kept[key][0] == count:
            self._kept.move_to_end(key)
            return self._kept[key][1]
        headers = await asyncio.to_thread(_datasets, await self._pacs.retrieve_metadata(study_uid, uid))
        if count == str(len(headers)):  # else the PACS is still at it, and the next answer may be another one
            self._kept[key] = (count, headers)
        while len(self._kept) > 1 and sum(len(kept) for _, kept in self._kept.values()) > KEPT_INSTANCES:
            self._kept.popitem(last=False)
        return headers


def _study_of_outlines(study_uid: str, series: Sequence[DicomJson]) -> Study | None:
    pairs = [(first_value(one, _SERIES_UID), _outline(study_uid, one)) for one in series]
    return datasets_to_study(pairs) if pairs else None


def _outline(study_uid: str, series: DicomJson) -> Dataset:
    """One data set that stands for a series: what the search told, and its number of instances where the UID of one
    would be, so that a series that grows looks different."""
    dataset = _dataset({**series, "0020000D": {"vr": "UI", "Value": [study_uid]}})
    dataset.SOPInstanceUID = f"0.{first_value(series, _INSTANCES) or 0}"
    return dataset


def _is_of_images(series: DicomJson) -> bool:
    return first_value(series, _MODALITY) not in NON_IMAGE_MODALITIES


def outline_beside(whose: Dataset | None, study_uid: str, series: DicomJson) -> Dataset:
    """The outline of a series that is about images: no role looks at it. Whose it is the images say: a search leaves
    out the issuer, and a PACS that keeps patients by their number alone (Orthanc) tells another site's person of it."""
    outline = _outline(study_uid, series)
    if whose is None:
        return outline
    for keyword in _WHOSE:
        if keyword in outline:
            del outline[keyword]
        if keyword in whose:
            outline[keyword] = whose[keyword]
    return outline


_WHOSE = ("PatientID", "IssuerOfPatientID", "PatientName", "PatientBirthDate", "PatientSex", "PatientAge")


def _datasets(headers: Sequence[DicomJson]) -> list[Dataset]:
    return [_dataset(one) for one in headers]


def _dataset(headers: DicomJson) -> Dataset:
    """DICOM JSON as a dataset of the elements that a `Study` is made of. Raises Permanent where it names no study."""
    elements = {tag: element for tag, element in headers.items() if tag.upper() in HEADER_TAGS}
    try:
        dataset = Dataset.from_json(elements, bulk_data_uri_handler=_no_bulk_data)
    except Exception:  # one broken element must not lose the instance, as when a file is read
        dataset = _readable_part(elements)
    if not dataset.get("StudyInstanceUID"):
        raise Permanent("the PACS answered with headers that name no study")
    return dataset


def _readable_part(elements: DicomJson) -> Dataset:
    dataset = Dataset()
    for tag, element in elements.items():
        with contextlib.suppress(Exception):
            dataset.update(Dataset.from_json({tag: element}, bulk_data_uri_handler=_no_bulk_data))
    return dataset


def _no_bulk_data(_uri: str) -> None:
    return None
