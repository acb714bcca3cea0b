"""`wetread process`: one study now, from a folder or the PACS, its files in a folder, its end as an exit code."""

import asyncio
import fcntl
import json
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from dbos import DBOS, SetWorkflowID
from pydicom.uid import UID

from middleware.bootstrap import (
    PROCESS,
    BundleContext,
    Overrides,
    open_folder,
    open_systems,
    prepare_data_dir,
    run_workflows,
)
from middleware.dispatching import deliver_now
from middleware.errors import SettingsError, Stopped
from middleware.intake.images import shorten_list
from middleware.intake.inbox import accept_study, workflow_id
from middleware.ports import StudyFolder
from middleware.release.deliveries import DESTINATIONS
from middleware.settings import DeliverSettings, RetrySettings, Settings
from middleware.store.tables import Delivery, StudyJob
from middleware.systems import Systems
from middleware.trace import build_trace
from middleware.workflow import read_study

DONE, USAGE, UNMATCHED, UNUSABLE, UNDELIVERED = 0, 2, 3, 4, 5
FAILED = 1
STOPPED = 130
EXIT_CODES = {
    "released": DONE,
    "unmatched": UNMATCHED,
    "unusable": UNUSABLE,
    "held": UNUSABLE,
    "rejected": UNUSABLE,
    "quarantined": UNDELIVERED,
    "failed": FAILED,
}
RESULT_FILES = (
    "findings.json",
    "seg.dcm",
    "sr.dcm",
    "oru.hl7",
    "fhir-bundle.json",
    "report.txt",
    "report.html",
    "trace.json",
)
IMPATIENT = RetrySettings(attempts=3, first_wait_s=0.5, longest_wait_s=5.0)
"""A person is waiting: systems that are down are named within seconds."""
PATIENCE = timedelta(seconds=3)
"""So long a command keeps trying destinations that do not answer; then they are left to the service."""


@dataclass(frozen=True)
class Request:
    """What `wetread process` was asked for."""

    source: str
    out: Path
    context_file: Path | None = None
    protocol: str = ""
    triton: str = ""


@dataclass(frozen=True)
class Result:
    """How it ended: the exit code, the job with its reasons, the files written and the deliveries."""

    exit_code: int
    state: str
    reasons: tuple[str, ...]
    files: tuple[Path, ...] = ()
    deliveries: tuple[Delivery, ...] = ()


async def process_study(settings: Settings, request: Request) -> Result:
    """Read one study to the end. Raises SettingsError for what was asked wrongly."""
    prepare_out(request.out)
    with _state(settings) as local:
        try:
            study_uid, overrides = await _resolve(local, request)
        except Stopped as stop:
            return Result(EXIT_CODES[stop.state], stop.state, stop.reasons)
        async with open_systems(local, overrides) as systems:
            if request.protocol and request.protocol not in systems.protocols:
                raise SettingsError(f"no protocol '{request.protocol}'; there are {', '.join(systems.protocols)}")
            async with run_workflows(systems, executor_id=f"{PROCESS}-{socket.gethostname()}", listen=False):
                job = await _read(systems, study_uid, request.protocol)
            files = write_result(systems, job, request.out)
            deliveries = _deliveries_of(systems, job)
    exit_code = EXIT_CODES[job.state]
    if exit_code == DONE and any(d.state != "delivered" for d in deliveries):
        exit_code = UNDELIVERED
    return Result(exit_code, job.state, tuple(job.reasons), files, deliveries)


@contextmanager
def _state(settings: Settings) -> Iterator[Settings]:
    """Where this run remembers: the site's data_dir when results go somewhere (so that the same study read twice
    is delivered once), else a folder that goes away."""
    shorter = {"retry": _shorter(settings.retry), "deliver": _hurried(settings.deliver)}
    settings = settings.model_copy(update=shorter)
    if settings.pacs or settings.ehr or settings.ris:
        prepare_data_dir(settings)
        with (settings.data_dir / "process.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise SettingsError(f"another `wetread process` is using {settings.data_dir}; wait for it") from error
            yield settings
    else:
        with tempfile.TemporaryDirectory(prefix="wetread-") as folder:
            yield settings.model_copy(update={"data_dir": Path(folder), "database_url": "", "artifacts_url": ""})


def _shorter(retry: RetrySettings) -> RetrySettings:
    return IMPATIENT if retry.attempts > IMPATIENT.attempts else retry


def _hurried(deliver: DeliverSettings) -> DeliverSettings:
    """Deliveries as a person waits for them, with short waits. That one command was in vain does not make a
    destination down for everybody."""
    hurried = {"first_wait_s": 0.5, "longest_wait_s": 1.0, "down_after": 1_000_000}
    return deliver.model_copy(update={d: deliver.to(d).model_copy(update=hurried) for d in DESTINATIONS})


async def _resolve(settings: Settings, request: Request) -> tuple[str, Overrides]:
    """The study's UID, and where its images and context come from. Raises Stopped (unusable), SettingsError."""
    context = read_context(request.context_file) if request.context_file else None
    name = f"the context file {request.context_file.name}" if request.context_file else ""
    path = Path(request.source)
    if path.is_dir():
        folder = open_folder(path)
        uid = await _only_study(folder, path)
        return uid, Overrides(images=folder, context=context, context_name=name, triton=request.triton)
    if path.is_file():
        raise SettingsError(f"{path} is a file; give the folder that holds the study's DICOM files")
    if not UID(request.source).is_valid or "." not in request.source:
        raise SettingsError(f"folder {path} is not there (and it is no StudyInstanceUID)")
    if settings.pacs is None:
        raise SettingsError("a StudyInstanceUID needs a PACS to fetch from: set pacs.url in wetread.yaml")
    return request.source, Overrides(context=context, context_name=name, triton=request.triton)


async def _only_study(folder: StudyFolder, path: Path) -> str:
    studies = await folder.search_studies({})
    broken = [f"{s.path.relative_to(path)}: {s.reason}" for s in folder.skipped if s.is_dicom]
    if broken:
        raise Stopped("unusable", shorten_list(broken))
    if not studies:
        others = len(folder.skipped)
        found = f"{others} files, none of them DICOM" if others else "no files at all"
        raise Stopped("unusable", (f"folder {path} holds {found}",))
    uids = [study["0020000D"]["Value"][0] for study in studies]
    if len(uids) > 1:
        raise Stopped("unusable", (f"folder {path} holds {len(uids)} studies, not one:", *shorten_list(sorted(uids))))
    return str(uids[0])


def read_context(file: Path) -> BundleContext:
    """The FHIR Bundle in `file`. Raises SettingsError naming what is wrong with it."""
    try:
        bundle = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--context {file}: cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise SettingsError(f"--context {file}: not JSON, line {error.lineno}: {error.msg}") from error
    entries = bundle.get("entry", []) if isinstance(bundle, dict) else None
    if not isinstance(bundle, dict) or bundle.get("resourceType") != "Bundle" or not isinstance(entries, list):
        raise SettingsError(f"--context {file}: must be a FHIR Bundle (resourceType Bundle with a list of entries)")
    if not all(isinstance(e, dict) and isinstance(e.get("resource", {}), dict) for e in entries):
        raise SettingsError(f"--context {file}: every entry must be an object with a resource")
    return BundleContext(bundle)


def prepare_out(out: Path) -> None:
    """Make the folder and remove an earlier result of ours, so that no old file passes for a new one."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in RESULT_FILES:
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / "key-images", ignore_errors=True)
    except OSError as error:
        raise SettingsError(f"--out {out}: cannot be written: {error.strerror}") from error


async def _read(systems: Systems, study_uid: str, protocol: str) -> StudyJob:
    """Accept the study, wait for its reading and for every delivery to settle."""
    job, _ = accept_study(
        systems.store, study_uid, source="process", key=uuid4().hex, now=systems.now(), by_command=True
    )
    state = ""
    while job.state in ("accepted", "reading") or not state:
        # A run that an earlier command left unfinished goes on first; then comes ours.
        with SetWorkflowID(workflow_id(job)):
            handle = await DBOS.start_workflow_async(read_study, job.job_id, study_uid, protocol)
        state = await handle.get_result(polling_interval_sec=0.05)
        job = systems.store.job(job.job_id)
    if state == "released":
        await deliver_now(systems, job.job_id, job.revision, PATIENCE)
    return systems.store.job(job.job_id)


def _deliveries_of(systems: Systems, job: StudyJob) -> tuple[Delivery, ...]:
    """The deliveries of the job's present revision."""
    return tuple(d for d in systems.store.deliveries(job_id=job.job_id) if d.revision == job.revision)


def write_result(systems: Systems, job: StudyJob, out: Path) -> tuple[Path, ...]:
    """Write the artifacts of a released (or undeliverable) result, and the trace of any: all of them or, with an
    OSError, none."""
    contents: dict[str, bytes] = {}
    if job.state == "released":
        records = systems.store.artifacts(job.job_id, job.revision)
        contents = {r.name: systems.artifacts.get(r.digest) for r in records if not _is_secondary_capture(r.name)}
        contents["findings.json"] = _pretty(json.loads(systems.artifacts.get(job.facts["findings"])))
    contents["trace.json"] = _pretty(build_trace(systems, job.job_id))
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=out) as folder:
        for name, data in contents.items():
            file = Path(folder) / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(data)
        for name in contents:
            (out / name).parent.mkdir(exist_ok=True)
            (Path(folder) / name).replace(out / name)
    written = sorted(out / name for name in contents if name != "trace.json")
    return (*written, out / "trace.json")


def _is_secondary_capture(name: str) -> bool:
    """Key images are DICOM for the PACS; a person gets their PNG."""
    return name.startswith("key-images/") and name.endswith(".dcm")


def _pretty(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def run_process(settings: Settings, request: Request) -> Result:
    """`process_study` from synchronous code."""
    return asyncio.run(process_study(settings, request))
