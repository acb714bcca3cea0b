"""What is kept of readings, opened for reading while the service runs: nothing here changes it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from mappings.model.context import ClinicalContext
from mappings.model.findings import RoleChoice
from mappings.model.study import Study
from middleware.intake.deciding import Decided
from middleware.settings import Settings
from middleware.store.artifacts import ArtifactStore
from middleware.store.deliveries import DeliveryStore
from middleware.store.hearing import HearingStore
from middleware.store.queries import Store, open_engine
from middleware.store.tables import StudyJob

Kind = TypeVar("Kind")

_STUDY = TypeAdapter(Study)
_CONTEXT = TypeAdapter(ClinicalContext)
_DECIDED = TypeAdapter(Decided)
_ROLES = TypeAdapter(tuple[RoleChoice, ...])


@dataclass(frozen=True)
class Kept:
    """The stores, and what a job kept there; None where it kept none, or it is there no more."""

    store: Store
    heard: HearingStore
    deliveries: DeliveryStore
    artifacts: ArtifactStore

    def study(self, job: StudyJob) -> Study | None:
        """The study as its images told it."""
        return self._load(job, "study", _STUDY)

    def context(self, job: StudyJob) -> ClinicalContext | None:
        """What the EHR said."""
        return self._load(job, "context", _CONTEXT)

    def decided(self, job: StudyJob) -> Decided | None:
        """Every verdict of the run that last came so far."""
        return self._load(job, "rules", _DECIDED)

    def roles(self, job: StudyJob) -> tuple[RoleChoice, ...]:
        """The series of each role."""
        return self._load(job, "roles", _ROLES) or ()

    def text(self, digest: str) -> str | None:
        """A kept text, such as a protocol file's, by its sha256."""
        data = self._get(digest)
        return data.decode() if data is not None else None

    def _load(self, job: StudyJob, fact: str, adapter: TypeAdapter[Kind]) -> Kind | None:
        data = self._get(job.facts.get(fact) or "")
        try:
            return adapter.validate_json(data) if data is not None else None
        except ValidationError:  # kept by another version
            return None

    def _get(self, digest: str) -> bytes | None:
        try:
            return self.artifacts.get(digest) if digest else None
        except (FileNotFoundError, ValueError):
            return None


@contextmanager
def open_kept(settings: Settings) -> Iterator[Kept | None]:
    """What this site keeps; None where nothing was ever kept (asking must not make an empty database)."""
    url = settings.store_url
    if url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).is_file():
        yield None
        return
    engine = open_engine(url)
    artifacts = ArtifactStore(settings.artifacts_place)
    try:
        yield Kept(Store(engine), HearingStore(engine, settings.site.issuers), DeliveryStore(engine), artifacts)
    finally:
        engine.dispose()
