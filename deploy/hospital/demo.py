"""`wetread demo`: the simulator hospital around the real service, one study read, and proof of what arrived."""

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import pydicom
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from connectors.dicomweb.client import DicomwebClient
from connectors.dicomweb.config import DicomwebConfig
from connectors.dicomweb.folder import FolderClient
from connectors.fhir.client import FhirClient
from connectors.fhir.config import FhirConfig
from deploy.hospital import process
from deploy.hospital.chart import chart_bundle
from deploy.hospital.hospital import Hospital, open_hospital
from deploy.hospital.inspection import Received, inspect_end_state
from deploy.hospital.phantom import PhantomSpec
from deploy.hospital.phantom_dicom import write_phantom

READING_TIMEOUT_S = 180.0
GOING_ON = ("waiting", "accepted", "reading")
SETTLED = ("delivered", "dead", "ambiguous")


class DemoFailed(Exception):
    """The demo cannot go on; the message says why and where to look."""


def run_demo(study: Path | None, *, once: bool, console: Console) -> int:
    """Run the demo; 0 where everything arrived, 1 otherwise. Without `once` it stays up until interrupted."""
    if study is not None and not study.is_dir():
        console.print(f"[bold red]--study {escape(str(study))} is not a folder[/]")
        return 2
    with tempfile.TemporaryDirectory(prefix="wetread-demo-") as folder:
        try:
            return _run(Path(folder), study, once, console)
        except (DemoFailed, process.ServerNotReady, httpx.HTTPError, RuntimeError) as error:
            console.print(f"[bold red]The demo failed:[/] {escape(str(error))}", soft_wrap=True)
            return 1


def _run(workdir: Path, study: Path | None, once: bool, console: Console) -> int:
    console.print("[bold]Starting the simulator hospital[/] (loopback only, in a temporary folder)")

    def told(name: str, what: str, seconds: float) -> None:
        mark = "[yellow]![/]" if "fallback" in what else "[green]✓[/]"
        console.print(f"{mark} [dim]{seconds:5.1f} s[/] {name:<8} {escape(what)}", soft_wrap=True)

    with open_hospital(workdir, told=told) as hospital:
        spec = PhantomSpec()
        images = study or write_phantom(spec, workdir / "phantom")
        study_uid, chart = _chart_of(images, spec if study is None else None)
        with _service(hospital, told) as api:
            asyncio.run(_load(hospital, images, study_uid, chart))
            told("data", "a real study and a chart for its patient" if study else "a phantom with known truth", 0.0)
            job = _read(api, study_uid, console)
            received = asyncio.run(inspect_end_state(hospital, study_uid, job, spec if study is None else None))
            _show(received, console)
            faults = [r for r in received if not r.right]
            if faults:
                console.print(f"[bold red]{len(faults)} of {len(received)} checks failed.[/]")
            else:
                console.print(f"[bold green]All {len(received)} checks hold.[/]")
            if not once:
                _stay(api, hospital, console)
            return 1 if faults else 0


@contextmanager
def _service(hospital: Hospital, told: Any) -> Iterator[str]:
    began = time.perf_counter()
    port = process.free_port()
    settings = hospital.write_settings(port)
    command = [sys.executable, "-m", "middleware.cli", "serve", "--config", str(settings)]
    api = f"http://127.0.0.1:{port}"
    with process.start("wetread serve", command, hospital.workdir / "service.log") as service:
        service.wait_until(lambda: process.answers(f"{api}/ready", 5.0), 60.0)
        told("Wetread", f"wetread serve at {api}", time.perf_counter() - began)
        yield api


def _chart_of(images: Path, spec: PhantomSpec | None) -> tuple[str, dict[str, Any]]:
    """The study's UID and a chart for its patient: the phantom's own, or for a real study the patient and the
    order that its headers name and no laboratory value (none is known, so none is made up)."""
    first = next((f for f in sorted(images.rglob("*")) if f.is_file() and pydicom.misc.is_dicom(f)), None)
    if first is None:
        raise DemoFailed(f"{images} holds no DICOM file")
    header = pydicom.dcmread(first, stop_before_pixels=True)
    if spec is not None:
        return str(header.StudyInstanceUID), chart_bundle(spec)
    born = str(header.get("PatientBirthDate", "") or "")
    real = PhantomSpec(
        patient_id=str(header.PatientID),
        patient_name=str(header.get("PatientName", "")),
        birth_date=date(int(born[:4]), int(born[4:6]), int(born[6:8])) if len(born) == 8 else date(1900, 1, 1),
        sex=str(header.get("PatientSex", "M") or "M"),
        accession=str(header.get("AccessionNumber", "") or "DEMO-1"),
    )
    chart = chart_bundle(real, psa_ng_ml=())
    kept = [e for e in chart["entry"] if e["resource"]["resourceType"] not in ("Observation", "Condition")]
    for entry in kept:
        if entry["resource"]["resourceType"] == "Patient" and len(born) != 8:
            del entry["resource"]["birthDate"]
    return str(header.StudyInstanceUID), {**chart, "entry": kept}


async def _load(hospital: Hospital, images: Path, study_uid: str, chart: dict[str, Any]) -> None:
    """Put the chart into the EHR and then the images into the PACS, as they come from a scanner."""
    ehr = FhirClient(FhirConfig(url=hospital.ehr.url))
    await ehr.transaction(chart)
    await ehr.aclose()
    files = [f for f in sorted(images.rglob("*")) if f.is_file() and pydicom.misc.is_dicom(f)]
    pacs: DicomwebClient | FolderClient
    if hospital.orthanc:
        pacs = DicomwebClient(DicomwebConfig(url=hospital.orthanc.dicomweb_url))
    else:
        hospital.pacs_folder.mkdir(exist_ok=True)
        pacs = FolderClient(hospital.pacs_folder)
    outcomes = await pacs.store(files, study_uid)
    await pacs.aclose()
    refused = [o for o in outcomes if not o.stored]
    if refused:
        raise DemoFailed(f"the PACS refused {len(refused)} of {len(outcomes)} images: {refused[0].reason}")


def _read(api: str, study_uid: str, console: Console) -> dict[str, Any]:
    """Wait until the study, of which nobody told Wetread, is heard of, read, and every delivery settled."""
    began = time.perf_counter()
    job: dict[str, Any] = {}
    with (
        httpx.Client(base_url=api, timeout=30, trust_env=False) as client,
        console.status("Waiting until the study is heard of") as status,
    ):
        while time.perf_counter() - began < READING_TIMEOUT_S:
            time.sleep(0.1)
            jobs = client.get(f"/studies/{study_uid}/jobs").json()
            if not jobs:
                continue
            if not job:
                _tell_time(console, began, "heard", "the PACS has a new study; nobody told Wetread")
            job = jobs[0]
            deliveries: list[dict[str, Any]] = client.get(f"/jobs/{job['job_id']}/deliveries").json()
            status.update(f"The study is {job['state']}, {len(deliveries)} deliveries")
            if job["state"] not in GOING_ON and all(d["state"] in SETTLED for d in deliveries):
                _tell_time(console, began, "read", f"state {job['state']}")
                return {**job, "deliveries": deliveries}
    raise DemoFailed(f"the study was not read within {READING_TIMEOUT_S:g} s; it is {json.dumps(job)[:500]}")


def _tell_time(console: Console, began: float, what: str, detail: str) -> None:
    console.print(f"[green]✓[/] [dim]{time.perf_counter() - began:5.1f} s[/] {what:<8} {detail}")


def _show(received: list[Received], console: Console) -> None:
    table = Table("system", "what it holds now", "right?", title="What every system received", title_justify="left")
    for line in received:
        table.add_row(line.system, escape(line.what), "[green]yes[/]" if line.right else f"[red]no: {line.wanted}[/]")
    console.print(table)


def _stay(api: str, hospital: Hospital, console: Console) -> None:
    console.print(f"\nThe hospital stays up. Service: {api}/docs  EHR: {hospital.ehr.url}")
    if hospital.orthanc:
        console.print(f"PACS: {hospital.orthanc.http_url}/app/explorer.html")
    console.print("Ctrl-C stops everything.")
    try:
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        console.print("Stopping.")
