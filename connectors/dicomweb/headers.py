"""Whole headers of files as DICOM JSON: what a server's metadata answer would hold, read once while unchanged."""

import json
import threading
from collections import OrderedDict

import pydicom

from connectors.dicomweb.metadata import SOP_UID, DicomJson, value_of, without_bulk
from connectors.dicomweb.scan import Entry

MAX_REMEMBERED_BYTES = 64 << 20
# A vendor's private b-value fits; his raw data, an overlay or an ICC profile does not.
_MAX_BINARY_CHARACTERS = 4096


class Headers:
    """Gives the header of an instance, without pixels and large binary elements. Blocking; threads may share it.

    Remembers those used last as JSON text (some 10 KiB each), at most `max_bytes` of it.
    """

    def __init__(self, *, max_bytes: int = MAX_REMEMBERED_BYTES) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._lock = threading.Lock()
        self._known: OrderedDict[Entry, bytes] = OrderedDict()

    def of(self, entry: Entry) -> DicomJson | None:
        """The header; None if the file has gone or was replaced since the folder was looked through."""
        with self._lock:
            if text := self._known.get(entry):
                self._known.move_to_end(entry)
                found: DicomJson = json.loads(text)
                return found
        header = _read(entry)
        if header is not None and entry.mark.settled:
            self._remember(entry, json.dumps(header, separators=(",", ":")).encode())
        return header

    def _remember(self, entry: Entry, text: bytes) -> None:
        with self._lock:
            self._bytes += len(text) - len(self._known.pop(entry, b""))
            self._known[entry] = text
            while self._bytes > self._max_bytes:
                self._bytes -= len(self._known.popitem(last=False)[1])


def _read(entry: Entry) -> DicomJson | None:
    try:
        header = pydicom.dcmread(entry.path, stop_before_pixels=True)
        told = header.to_json_dict(
            bulk_data_threshold=_MAX_BINARY_CHARACTERS,
            bulk_data_element_handler=lambda element: "",
            suppress_invalid_tags=True,
        )
    # The file was readable when the folder was looked through; whatever is wrong now, the next look tells it.
    except Exception:
        return None
    return without_bulk(told) if value_of(told, SOP_UID) == str(entry.header.SOPInstanceUID) else None
