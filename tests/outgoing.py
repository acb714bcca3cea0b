"""Deliveries by the dozen through the real queues: plans them, lets the service's loop start them, waits for states."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from mappings.model.ids import derive_control_id
from middleware.bootstrap import open_systems, run_workflows
from middleware.dispatching import look_after_deliveries
from middleware.settings import Settings
from middleware.store.tables import Delivery
from middleware.systems import Systems

NOW = datetime(2026, 3, 4, 10, 30, tzinfo=UTC)
QUICK = {"first_wait_s": 0.1, "longest_wait_s": 0.5, "probe_every_s": 0.5}


def settings_of(folder: Path, deliver: dict[str, Any], **systems: Any) -> Settings:
    """Settings of a service with these systems, quick in everything that `deliver` does not say otherwise."""
    how = {destination: {**QUICK, **deliver.get(destination, {})} for destination in ("pacs", "ehr", "ris")}
    return Settings.model_validate({"data_dir": folder / "data", "executor_id": "test", "deliver": how, **systems})


@asynccontextmanager
async def service(settings: Settings) -> AsyncIterator[Systems]:
    """The workflows and the loop that starts deliveries."""
    async with open_systems(settings) as systems, run_workflows(systems), look_after_deliveries(systems):
        yield systems


@dataclass(frozen=True)
class Parcel:
    """One result to one destination; `number` places it in time."""

    job_id: str
    number: int
    accession: str = ""
    destination: str = "ris"
    priority: int = 4
    data: bytes = b""


def oru(job_id: str) -> bytes:
    """A small ORU with the MSH-10 of the job's first revision."""
    control = derive_control_id(job_id, 1, "oru")
    header = f"MSH|^~\\&|WETREAD|A|RIS|B|20260304103000+0000||ORU^R01^ORU_R01|{control}|P|2.5.1"
    return f"{header}\rPID|1||X\rOBX|1|TX|||{job_id}\r".encode()


def report(job_id: str) -> bytes:
    """A transaction that stores one DiagnosticReport, once."""
    identifier = {"system": "urn:test", "value": job_id}
    resource = {"resourceType": "DiagnosticReport", "identifier": [identifier], "status": "preliminary"}
    put = {"method": "PUT", "url": f"DiagnosticReport?identifier=urn:test|{job_id}"}
    entry = {"resource": {**resource, "code": {"text": "test"}}, "request": put}
    return json.dumps({"resourceType": "Bundle", "type": "transaction", "entry": [entry]}).encode()


def send(systems: Systems, parcels: Sequence[Parcel]) -> None:
    """Plan the parcels; the loop starts them at once."""
    for parcel in parcels:
        at = NOW + timedelta(seconds=parcel.number)
        delivery = Delivery(
            delivery_id=f"{parcel.job_id}-{parcel.destination}",
            job_id=parcel.job_id,
            revision=1,
            destination=parcel.destination,
            artifact_name="oru.hl7" if parcel.destination == "ris" else "bundle.json",
            kind="x",
            digest=systems.artifacts.put(parcel.data or oru(parcel.job_id)).digest,
            position=0,
            order_key=parcel.accession or parcel.job_id,
            priority=parcel.priority,
            due_at=at,
            created_at=at,
            updated_at=at,
        )
        systems.store.plan_deliveries(parcel.job_id, 1, [delivery], at)


def states(systems: Systems, destination: str = "ris") -> dict[str, str]:
    """The state of each delivery to a destination, by job."""
    return {d.job_id: d.state for d in systems.deliveries.search(destination=destination)}


async def until(happened: Callable[[], bool], within_s: float = 120.0, look_every_s: float = 0.05) -> None:
    """Return once it has happened."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within_s
    while not happened():
        assert loop.time() < deadline, "it did not happen in time"
        await asyncio.sleep(look_every_s)


def all_in(systems: Systems, destination: str, *wanted: str) -> Callable[[], bool]:
    """Whether every delivery to a destination is in one of these states."""
    return lambda: set(states(systems, destination).values()) <= set(wanted)


def jobs_of(messages: Sequence[Any], known: Sequence[str]) -> list[str]:
    """Whose messages these are, in their order."""
    by_id = {derive_control_id(job_id, 1, "oru"): job_id for job_id in known}
    return [by_id[message.control_id] for message in messages]
