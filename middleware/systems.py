"""Everything that the steps act on, in one place; `bootstrap.py` fills it."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import jinja2

from middleware.intake.protocols import LoadedProtocol
from middleware.ports import ChangeLog, ContextSource, Ehr, ImageArchive, ImageSource, ModelServer, Ris
from middleware.settings import Settings
from middleware.store.arrivals import ArrivalStore
from middleware.store.artifacts import ArtifactStore
from middleware.store.deliveries import DeliveryStore
from middleware.store.ehr_events import EhrEventStore
from middleware.store.hearing import HearingStore
from middleware.store.queries import Store
from middleware.store.retention import RetentionStore
from middleware.store.workers import WorkerStore


@dataclass
class Systems:
    """Everything the steps act on. None where a site has not configured a system. `takes_from_queues`: this process
    runs what was queued, as `serve` and `worker` do."""

    settings: Settings
    store: Store
    heard: HearingStore
    arrivals: ArrivalStore
    ehr_events: EhrEventStore
    deliveries: DeliveryStore
    workers: WorkerStore
    retention: RetentionStore
    artifacts: ArtifactStore
    protocols: Mapping[str, LoadedProtocol]
    templates: jinja2.Environment
    images: ImageSource | None = None
    model: ModelServer | None = None
    pacs: ImageArchive | None = None
    changes: ChangeLog | None = None
    context: ContextSource | None = None
    context_name: str = ""
    ehr: Ehr | None = None
    ris: Ris | None = None
    public_keys: Callable[[], Mapping[str, Any]] | None = None
    takes_from_queues: bool = True
    now: Callable[[], datetime] = field(default=lambda: datetime.now().astimezone())

    def configured(self) -> tuple[str, ...]:
        """Names of the destinations that results can go to."""
        named = (("pacs", self.pacs), ("ehr", self.ehr), ("ris", self.ris))
        return tuple(name for name, system in named if system is not None)

    def probes(self) -> dict[str, Callable[[], Awaitable[str]]]:
        """How to ask each destination whether it answers."""
        named = (("pacs", self.pacs), ("ehr", self.ehr), ("ris", self.ris))
        return {name: system.probe for name, system in named if system is not None}
