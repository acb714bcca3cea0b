"""The one composition root: settings in, running systems out. Only this module knows connectors' clients."""

import asyncio
import gc
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from dbos import DBOS, DBOSClient, DBOSConfig
from sqlalchemy.exc import DBAPIError

from connectors.dicomweb.client import DicomwebClient
from connectors.dicomweb.folder import FolderClient
from connectors.errors import Permanent
from connectors.fhir.client import FhirClient
from connectors.fhir.keys import KeyRing
from connectors.mllp.client import MllpClient
from connectors.mllp.listener import MllpListener, MllpListenerConfig, OnMessage
from connectors.orthanc.client import OrthancChanges
from connectors.triton.client import TensorSpec, TritonClient
from connectors.triton.config import TritonConfig
from deploy.triton.bundled import BundledTriton, BundledTritonError
from mappings.model.protocol import Model, Tensor
from mappings.outputs.dicom_header import load_dicom_tables
from mappings.outputs.findings_to_draft import draft_environment
from middleware import steps
from middleware.delivering import queue_of
from middleware.durable import use_patience
from middleware.errors import SettingsError
from middleware.intake.protocols import load_protocols
from middleware.ports import Array, ContextSource, Inference
from middleware.release.deliveries import DESTINATIONS
from middleware.serialization import JsonSerializer
from middleware.settings import FolderPacs, Settings
from middleware.store.arrivals import ArrivalStore
from middleware.store.artifacts import ArtifactStore
from middleware.store.deliveries import DeliveryStore
from middleware.store.ehr_events import EhrEventStore
from middleware.store.hearing import HearingStore
from middleware.store.queries import Store, open_engine
from middleware.store.retention import RetentionStore
from middleware.store.workers import WorkerStore
from middleware.systems import Systems

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "deploy" / "triton" / "models"
TEMPLATES = ROOT / "templates" / "report"

WORKFLOW_VERSION = "3"
"""Version of the order of steps in workflow.py. Pending work of another version is not picked up, so it changes
only with that order, not with each release."""

READING_QUEUE = "readings"
POLLING_S = 0.1
"""How often a queue is asked for work."""

PROCESS = "process"
"""What executor ids of `wetread process` start with. Their work is nobody else's: images and context may be files."""


class _Model:
    """A Triton client in the protocol's words. With no address, the bundled server is started at the first use,
    so that input which cannot be read costs nobody its start."""

    def __init__(self, config: TritonConfig | None, stack: AsyncExitStack) -> None:
        self._config = config
        self._stack = stack
        self._client: TritonClient | None = None
        self._opening = asyncio.Lock()

    async def _open(self) -> TritonClient:
        async with self._opening:
            if self._client is None:
                self._client = TritonClient(self._config or await self._start_bundled())
                self._stack.push_async_callback(self._client.aclose)
            return self._client

    async def _start_bundled(self) -> TritonConfig:
        try:
            server = await self._stack.enter_async_context(BundledTriton(MODELS))
        except BundledTritonError as error:
            raise Permanent(f"the bundled Triton did not start: {error}. Set triton.url or give --triton") from error
        return TritonConfig(name="bundled triton", url=server.grpc_url)

    async def check_model(self, model: Model) -> None:
        """Raise unless the pinned model is ready with the protocol's tensors."""
        client = await self._open()
        await client.check_model(model.name, model.version, _specs(model.inputs), _specs(model.outputs))

    async def infer(
        self, model: Model, inputs: Mapping[str, Array], outputs: Sequence[Tensor], request_id: str
    ) -> Inference:
        """Ask within the shorter of the protocol's and the server's deadline."""
        client = await self._open()
        limit_s = self._config.deadline_s if self._config else model.deadline_s
        return await client.infer(
            model.name,
            model.version,
            inputs,
            _specs(outputs),
            deadline_s=min(model.deadline_s, limit_s),
            priority=model.priority,
            request_id=request_id,
        )

    async def probe(self) -> str:
        """One line about the server."""
        return await (await self._open()).probe()


def _specs(tensors: Sequence[Tensor]) -> list[TensorSpec]:
    return [TensorSpec(t.name, t.datatype, t.shape, t.allow_nan) for t in tensors]


class BundleContext:
    """Clinical context out of a FHIR Bundle given by hand, searched like an EHR."""

    def __init__(self, bundle: Mapping[str, Any]) -> None:
        self._entries = list(bundle.get("entry", []))

    async def search(
        self, resource_type: str, params: Mapping[str, str], *, limit: int | None = None
    ) -> list[dict[str, Any]]:
        """Every entry of the type, with the full URL that others refer to it by; whose they are is judged where
        they are read."""
        return [e for e in self._entries if e.get("resource", {}).get("resourceType") == resource_type][:limit]


def open_listener(config: MllpListenerConfig, on_message: OnMessage) -> MllpListener:
    """The HL7 listener; it listens while its `async with` block runs."""
    return MllpListener(config, on_message)


def open_folder(folder: Path) -> FolderClient:
    """A folder of DICOM files as a source of images."""
    return FolderClient(folder, name=f"folder {folder}")


@dataclass(frozen=True)
class Overrides:
    """What one `wetread process` replaces: where images come from, the context, and the inference server."""

    images: FolderClient | None = None
    context: BundleContext | None = None
    context_name: str = ""
    triton: str = ""


def prepare_data_dir(settings: Settings) -> None:
    """Make the folder of everything remembered. Raises SettingsError where it cannot be made or written."""
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=settings.data_dir):
            pass
    except OSError as error:
        raise SettingsError(f"data_dir {settings.data_dir}: cannot be written: {error.strerror}") from error


@asynccontextmanager
async def open_systems(settings: Settings, overrides: Overrides | None = None) -> AsyncIterator[Systems]:
    """Open every configured system and close it again. Opening connects to nothing yet."""
    overrides = overrides or Overrides()
    async with AsyncExitStack() as stack:
        prepare_data_dir(settings)
        engine = open_engine(settings.store_url)
        store = Store(engine)
        stack.callback(store.close)
        pacs = _open_pacs(settings)
        if isinstance(pacs, DicomwebClient):
            stack.push_async_callback(pacs.aclose)
        changes = OrthancChanges(settings.orthanc_changes) if settings.orthanc_changes else None
        if changes:
            stack.push_async_callback(changes.aclose)
        ehr = FhirClient(settings.ehr) if settings.ehr else None
        if ehr:
            stack.push_async_callback(ehr.aclose)
        ris = MllpClient(settings.ris) if settings.ris else None
        if ris:
            stack.push_async_callback(ris.aclose)
        context: ContextSource | None = overrides.context or ehr
        yield Systems(
            settings=settings,
            store=store,
            heard=HearingStore(engine, settings.site.issuers),
            arrivals=ArrivalStore(engine),
            ehr_events=EhrEventStore(engine),
            deliveries=DeliveryStore(engine),
            workers=WorkerStore(engine),
            retention=RetentionStore(engine),
            artifacts=ArtifactStore(settings.artifacts_place),
            protocols=load_protocols(settings.protocols_dir),
            templates=draft_environment(jinja2.FileSystemLoader(TEMPLATES)),
            images=overrides.images or pacs,
            model=_Model(_triton_config(settings, overrides), stack),
            pacs=pacs,
            changes=changes,
            context=context,
            context_name=overrides.context_name or (settings.ehr.name if settings.ehr else ""),
            ehr=ehr,
            ris=ris,
            public_keys=KeyRing(settings.ehr.oauth.key_files).published
            if settings.ehr and settings.ehr.oauth
            else None,
        )


def _open_pacs(settings: Settings) -> DicomwebClient | FolderClient | None:
    if settings.pacs is None:
        return None
    if isinstance(settings.pacs, FolderPacs):
        settings.pacs.folder.mkdir(parents=True, exist_ok=True)
        return FolderClient(settings.pacs.folder, name="pacs")
    return DicomwebClient(settings.pacs)


def _public_keys(settings: Settings) -> Callable[[], Mapping[str, Any]] | None:
    oauth = settings.ehr.oauth if settings.ehr else None
    return KeyRing(oauth.key_files).published if oauth else None


def _triton_config(settings: Settings, overrides: Overrides) -> TritonConfig | None:
    if not overrides.triton:
        return settings.triton
    try:
        return TritonConfig(url=overrides.triton)
    except ValueError as error:
        raise SettingsError(f"--triton {overrides.triton}: must be HOST:PORT of Triton's gRPC port") from error


@asynccontextmanager
async def run_workflows(systems: Systems, *, executor_id: str = "", listen: bool = True) -> AsyncIterator[None]:
    """Run the durable workflows in this process; work that it left unfinished earlier goes on at once.

    `listen`: also take readings from the queue, as `serve` and `worker` do.
    """
    settings = systems.settings
    _prepare_sqlite(settings.workflow_url)
    systems.takes_from_queues = listen
    steps.use(systems)
    # The service waits for its store as long as it takes; whoever runs one command wants to hear that it is away.
    use_patience(None if listen else settings.retry.attempts)
    if listen:
        await asyncio.to_thread(_warm_up, systems)
    config = DBOSConfig(
        name="wetread",
        system_database_url=settings.workflow_url,
        application_version=WORKFLOW_VERSION,
        executor_id=executor_id or settings.executor_name,
        serializer=JsonSerializer(),
        log_level="CRITICAL",  # its errors quote step inputs and messages; ours are in the store
        notification_listener_polling_interval_sec=0.1,
    )
    DBOS(config=config)
    if not listen:
        DBOS.listen_queues([])
    DBOS.launch()
    try:
        if listen:
            await _register_queues(settings)
        yield
    finally:
        DBOS.destroy()
        # DBOS made its own pool the loop's and has closed it; closing the connectors still needs one.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor())


async def _register_queues(settings: Settings) -> None:
    """One queue for readings and one for each destination. What the settings say holds from now on, also where an
    earlier process said otherwise."""
    await DBOS.register_queue_async(
        READING_QUEUE,
        worker_concurrency=settings.concurrent_readings,
        polling_interval_sec=POLLING_S,
        on_conflict="always_update",
    )
    for destination in DESTINATIONS:
        how = settings.deliver.to(destination)
        await DBOS.register_queue_async(
            queue_of(destination),
            global_concurrency=how.concurrency,
            limiter={"limit": how.per_minute, "period": 60.0} if how.per_minute else None,
            polling_interval_sec=POLLING_S,
            on_conflict="always_update",
        )


@contextmanager
def open_history(settings: Settings) -> Iterator[DBOSClient | None]:
    """The workflow engine's records, without running workflows; None where none were ever kept."""
    url = settings.workflow_url
    if url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).is_file():
        yield None
        return
    client = DBOSClient(system_database_url=url, serializer=JsonSerializer(), retry_connection_errors=False)
    try:
        client.list_application_versions()
    except DBAPIError:  # a database that no worker has prepared yet
        client.destroy()
        yield None
        return
    try:
        yield client
    finally:
        client.destroy()


def _warm_up(systems: Systems) -> None:
    """Load before the first study what is loaded once: highdicom's tables and the templates. They are half a
    million objects that live as long as the process, so the garbage collector need not look at them again."""
    load_dicom_tables()
    for name in systems.templates.list_templates(extensions=["j2"]):
        systems.templates.get_template(name)
    gc.collect()
    gc.freeze()


def _prepare_sqlite(url: str) -> None:
    """DBOS leaves SQLite's journal as it finds it; the write-ahead log lets readers and a writer work at once."""
    if url.startswith("sqlite:///"):
        connection = sqlite3.connect(url.removeprefix("sqlite:///"))
        connection.execute("PRAGMA journal_mode=WAL")
        connection.close()
