"""The request body of STOW-RS: a multipart/related stream of whole instances, read as it is sent."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pydicom
from pydicom.errors import InvalidDicomError

from connectors.errors import Permanent

_PIECE_BYTES = 1 << 20
_PART_HEADER = b"Content-Type: application/dicom\r\n\r\n"
_WANTED_TAGS = ["SOPInstanceUID", "StudyInstanceUID"]


@dataclass(frozen=True)
class Upload:
    """Instances ready to be sent: their UIDs in order, and the exact size of the body."""

    instances: tuple[Path | bytes, ...]
    sop_instance_uids: tuple[str, ...]
    boundary: str

    @property
    def content_type(self) -> str:
        return f'multipart/related; type="application/dicom"; boundary="{self.boundary}"'

    @property
    def content_length(self) -> int:
        framing = len(self._opening()) + len(b"\r\n")
        return sum(_size(one) + framing for one in self.instances) + len(self._closing())

    def _opening(self) -> bytes:
        return f"--{self.boundary}\r\n".encode() + _PART_HEADER

    def _closing(self) -> bytes:
        return f"--{self.boundary}--\r\n".encode()

    async def body(self) -> AsyncIterator[bytes]:
        """The body in pieces of at most 1 MiB; files are read in a thread."""
        for one in self.instances:
            yield self._opening()
            async for piece in _pieces(one):
                yield piece
            yield b"\r\n"
        yield self._closing()


def prepare(instances: Sequence[Path | bytes], study_uid: str, boundary: str, where: str) -> Upload:
    """Reads the UIDs of every instance, so that each outcome can be told apart; blocking.

    Raises Permanent for what is not DICOM, belongs to another study, or carries the UID of another one given.
    """
    uids = [_sop_instance_uid(one, study_uid, f"{where}: instance {n}") for n, one in enumerate(instances, 1)]
    if not uids:
        raise Permanent(f"{where}: no instances were given.")
    if len(set(uids)) != len(uids):
        raise Permanent(f"{where}: two of the instances carry the same SOP Instance UID. Give each its own.")
    return Upload(tuple(instances), tuple(uids), boundary)


def _sop_instance_uid(instance: Path | bytes, study_uid: str, where: str) -> str:
    source = BytesIO(instance) if isinstance(instance, bytes) else instance
    try:
        header = pydicom.dcmread(source, stop_before_pixels=True, specific_tags=_WANTED_TAGS)
        uid, study = str(header.SOPInstanceUID), str(header.StudyInstanceUID)
    except (InvalidDicomError, AttributeError, OSError, EOFError, ValueError, KeyError) as error:
        raise Permanent(f"{where} is not a readable DICOM file ({type(error).__name__}).") from error
    if study != study_uid:
        raise Permanent(f"{where} belongs to another study than the one it is to be stored in.")
    return uid


def _size(instance: Path | bytes) -> int:
    return len(instance) if isinstance(instance, bytes) else instance.stat().st_size


async def _pieces(instance: Path | bytes) -> AsyncIterator[bytes]:
    if isinstance(instance, bytes):
        for start in range(0, len(instance), _PIECE_BYTES):
            yield instance[start : start + _PIECE_BYTES]
        return
    with await asyncio.to_thread(instance.open, "rb") as file:
        while piece := await asyncio.to_thread(file.read, _PIECE_BYTES):
            yield piece
