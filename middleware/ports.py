"""What the steps need of the outside, as small Protocols; `bootstrap.py` fills them with connectors."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mappings.model.protocol import Model, Tensor

Array = np.ndarray[Any, np.dtype[Any]]


class FetchedStudy(Protocol):
    """A study in the spool."""

    @property
    def files(self) -> tuple[Path, ...]:
        """One file an instance."""

    @property
    def bytes_received(self) -> int:
        """How much that was."""


class ImageSource(Protocol):
    """Where images come from: a PACS or a folder."""

    async def fetch_study(
        self, study_uid: str, into: Path, *, on_progress: Callable[[int, int], None] | None = None
    ) -> FetchedStudy:
        """Fetch all instances of a study into the folder `into`, whole or not at all."""

    async def probe(self) -> str:
        """One line about what answers there."""


class SkippedFile(Protocol):
    """A file of a folder that is not used."""

    @property
    def path(self) -> Path:
        """Which file."""

    @property
    def reason(self) -> str:
        """Why."""

    @property
    def is_dicom(self) -> bool:
        """Whether it claims to be DICOM, so that something is wrong with it."""


class StudyFolder(ImageSource, Protocol):
    """A folder of DICOM files."""

    async def search_studies(self, filters: Mapping[str, str]) -> list[dict[str, Any]]:
        """The studies in it, as DICOM JSON."""

    @property
    def skipped(self) -> Sequence[SkippedFile]:
        """Files that the last search did not use."""


class StoreOutcome(Protocol):
    """What became of one instance that was stored."""

    @property
    def sop_instance_uid(self) -> str:
        """Which instance."""

    @property
    def stored(self) -> bool:
        """Whether the PACS said that it has it."""

    @property
    def reason(self) -> str:
        """Why not."""

    @property
    def code(self) -> int | None:
        """The failure or warning reason (PS3.18 Annex I.2); None where the PACS gave none."""

    @property
    def warning(self) -> str:
        """What the PACS did to an instance that it stored, such as coercion."""

    @property
    def retryable(self) -> bool:
        """Whether trying again may help."""


class ImageArchive(ImageSource, Protocol):
    """A PACS that also takes results."""

    async def search_studies(self, filters: Mapping[str, str], *, include: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Studies that match, as DICOM JSON (QIDO-RS)."""

    async def search_series(
        self, study_uid: str, filters: Mapping[str, str] | None = None, *, include: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        """Series of one study, as DICOM JSON (QIDO-RS)."""

    async def search_instances(
        self, study_uid: str, filters: Mapping[str, str] | None = None, *, include: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        """Instances of one study, as DICOM JSON (QIDO-RS)."""

    async def retrieve_metadata(self, study_uid: str, series_uid: str) -> list[dict[str, Any]]:
        """The headers of a series' instances, as DICOM JSON (WADO-RS)."""

    async def store(self, instances: Sequence[Path | bytes], study_uid: str) -> Sequence[StoreOutcome]:
        """Store instances; one outcome each, in the order given."""


class StudyChange(Protocol):
    """One entry of a PACS' log of changes."""

    @property
    def sequence(self) -> int:
        """Its number."""

    @property
    def kind(self) -> str:
        """What happened: NewStudy, NewSeries, StableStudy."""

    @property
    def study_instance_uid(self) -> str:
        """To which study."""


class StudyChanges(Protocol):
    """A page of a PACS' log of changes."""

    @property
    def items(self) -> Sequence[StudyChange]:
        """Its entries about studies."""

    @property
    def last(self) -> int:
        """The number to ask from next."""

    @property
    def done(self) -> bool:
        """Whether there is nothing newer."""

    @property
    def reset(self) -> bool:
        """Whether the log begins anew, so that numbers remembered of it mean nothing."""


class ChangeLog(Protocol):
    """A PACS that keeps a log of changes (Orthanc)."""

    async def changes_since(self, sequence: int) -> StudyChanges:
        """The changes after a number, a page of them."""

    async def last_sequence(self) -> int:
        """The newest number."""

    async def probe(self) -> str:
        """One line about what answers there."""


class ContextSource(Protocol):
    """Where clinical context comes from: an EHR, or a Bundle given by hand."""

    async def search(
        self, resource_type: str, params: Mapping[str, str], *, limit: int | None = None
    ) -> list[dict[str, Any]]:
        """FHIR resources (or Bundle entries that hold them) of one type that match the search parameters."""


class Ehr(ContextSource, Protocol):
    """An EHR that also takes results."""

    async def transaction(self, bundle: dict[str, Any]) -> dict[str, Any]:
        """Run a FHIR transaction, wholly or not at all; the server's answer."""

    async def create(self, resource: dict[str, Any], *, if_none_exist: Mapping[str, str]) -> dict[str, Any]:
        """Create a resource unless one matches these search parameters; the one that is there then."""

    async def update(self, resource: dict[str, Any]) -> dict[str, Any]:
        """Put a resource in the place of the one of its id; what the server then has."""

    async def operation(self, reference: str, name: str, params: Mapping[str, str]) -> dict[str, Any]:
        """What a `$name` operation that changes nothing answers on `Type/id`."""

    async def probe(self) -> str:
        """One line about what answers there."""


class Acknowledgement(Protocol):
    """A RIS' answer to one message."""

    @property
    def code(self) -> str:
        """MSA-1."""

    @property
    def raw(self) -> bytes:
        """The whole answer."""


class Ris(Protocol):
    """A RIS that takes HL7 messages."""

    async def send(self, message: bytes, control_id: str) -> Acknowledgement:
        """Send one message; returns only for a positive answer whose MSA-2 is `control_id`."""

    async def probe(self) -> str:
        """One line about what answers there."""


class Inference(Protocol):
    """A model's checked answer."""

    @property
    def outputs(self) -> dict[str, Array]:
        """Tensors by name."""

    @property
    def model_name(self) -> str:
        """The model that answered."""

    @property
    def model_version(self) -> str:
        """Its version."""


class ModelServer(Protocol):
    """An inference server."""

    async def check_model(self, model: Model) -> None:
        """Raise unless the model is ready with the protocol's tensors."""

    async def infer(
        self, model: Model, inputs: Mapping[str, Array], outputs: Sequence[Tensor], request_id: str
    ) -> Inference:
        """Ask the pinned model; the answer has exactly `outputs`, checked."""

    async def probe(self) -> str:
        """One line about what answers there."""
