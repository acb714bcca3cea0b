"""`wetread check`: does every configured system answer?"""

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from dbos import DBOSClient

from connectors.errors import ConnectorError
from middleware.bootstrap import WORKFLOW_VERSION, open_history, open_systems
from middleware.settings import Settings
from middleware.store.workers import ALIVE, Worker
from middleware.systems import Systems
from middleware.taking_over import find_lost, find_stranded


@dataclass(frozen=True)
class Probe:
    """What one system answered, or why it did not."""

    system: str
    configured: bool
    answers: bool
    text: str


async def probe_all(settings: Settings) -> list[Probe]:
    """Ask the store and each system, one after the other."""
    async with open_systems(settings) as systems:
        systems.store.ping()
        probes = [Probe("store", True, True, systems.settings.store_url.split("@")[-1])]
        named: tuple[tuple[str, Any, str], ...] = (
            ("pacs", systems.pacs, "not configured: set pacs.url (results stay in the artifact store)"),
            ("orthanc", systems.changes, "not configured: set orthanc_changes.url where the PACS is Orthanc"),
            ("ehr", systems.ehr, "not configured: set ehr.url (no context, no DiagnosticReport)"),
            ("ris", systems.ris, "not configured: set ris.host and ris.port (no ORU)"),
            ("triton", systems.model, ""),
        )
        probes += [await _probe(name, system, otherwise) for name, system, otherwise in named]
        return [*probes, *await asyncio.to_thread(_probe_work, systems)]


async def _probe(name: str, system: Any, otherwise: str) -> Probe:
    if system is None:
        return Probe(name, False, False, otherwise)
    try:
        return Probe(name, True, True, await system.probe())
    except ConnectorError as error:
        return Probe(name, True, False, str(error))


def _probe_work(systems: Systems) -> list[Probe]:
    """Who works on this database, and whether work is left that nobody will do."""
    within = timedelta(seconds=systems.settings.workers.dead_after_s)
    living = [w for w in systems.workers.workers() if w.state == ALIVE and systems.now() - w.last_seen_at < within]
    named = ", ".join(f"{w.executor_id} on {w.host}, version {w.version}" for w in living)
    workers = Probe("workers", bool(living), bool(living), named or "none is running")
    with open_history(systems.settings) as history:
        return [workers] if history is None else [workers, _probe_history(systems, history, living)]


def _probe_history(systems: Systems, history: DBOSClient, living: list[Worker]) -> Probe:
    stranded = find_stranded(history, {worker.version for worker in living})
    lost = find_lost(history, systems.store, systems.now())
    faults = []
    if stranded:
        versions = ", ".join(sorted({str(workflow.app_version) for workflow in stranded}))
        faults.append(
            f"{len(stranded)} unfinished workflow(s) of version {versions}, which no living worker has; the next to "
            f"start goes on with them (in version {WORKFLOW_VERSION}: anew)"
        )
    if lost:
        faults.append(
            f"{len(lost)} reading(s) whose workflow has ended, such as job {lost[0].job_id}; a worker fails them"
        )
    return Probe("work", True, not faults, "; ".join(faults) or "nothing is stranded")
