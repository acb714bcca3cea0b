"""The real study through the real service: what each reading costs beside fetch and inference, and the whole of it
beside a plain script. Run: `python -m tests.bench.bench_end_to_end`; also part of `make bench`.

`wetread serve` reads one study cold and several warm, each with fresh UIDs, from a real Orthanc and with a real Triton
whose model answers at once (the truth masks). The rival is what one would write with the libraries alone: fetch by
dicomweb-client, resample, ask by tritonclient, SEG by highdicom, STOW. It keeps nothing, checks nothing, reads no
context, and makes neither SR, key images, drafts nor messages.
"""

import asyncio
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pydicom
import yaml
from pydicom.uid import generate_uid

from connectors.dicomweb.client import DicomwebClient
from connectors.dicomweb.config import DicomwebConfig
from deploy.hospital import process
from deploy.hospital.pacs import start_orthanc
from deploy.triton.bundled import BundledTriton
from middleware.store.queries import Store, open_engine
from tests.bench.plain_script import read_plainly
from tests.bench.row import Row
from tests.fixtures.triton_truth import build_truth_repository
from tests.fixtures.triton_truth.study import DATA, real_study

WARM_READINGS = 5
ELSE_BUDGET_S = 2.0
STEP_OUTPUT_BUDGET_BYTES = 16 * 1024
READING_TIMEOUT_S = 120.0
UID_KEYWORDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID")


@dataclass(frozen=True)
class Reading:
    """One reading by the service: seconds from its event to the last delivery, and of each step."""

    wall_s: float
    steps_s: dict[str, float]

    @property
    def else_s(self) -> float:
        """All steps but fetch and inference."""
        return sum(s for step, s in self.steps_s.items() if step not in ("fetch", "inference"))

    @property
    def wall_else_s(self) -> float:
        """The wall clock less fetch and inference: steps, deliveries, and what the workflow itself costs."""
        return self.wall_s - self.steps_s["fetch"] - self.steps_s["inference"]


def copy_with_fresh_uids(number: int, to: Path) -> tuple[str, list[Path]]:
    """The real study once more with other UIDs (the same for the same `number`); its study UID and files."""
    to.mkdir()
    study_uid, files = "", []
    for index, file in enumerate(sorted((DATA / "images").rglob("*.dcm"))):
        dataset = pydicom.dcmread(file)
        for keyword in UID_KEYWORDS:
            setattr(dataset, keyword, generate_uid(entropy_srcs=[f"bench {number}", str(dataset[keyword].value)]))
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        files.append(to / f"{index:04}.dcm")
        dataset.save_as(files[-1])
        study_uid = str(dataset.StudyInstanceUID)
    return study_uid, files


async def store(root: str, files: Sequence[Path], study_uid: str) -> None:
    """Put a study into the PACS."""
    client = DicomwebClient(DicomwebConfig(url=root))
    outcomes = await client.store(files, study_uid)
    await client.aclose()
    if not all(outcome.stored for outcome in outcomes):
        raise RuntimeError("Orthanc did not take the study")


@contextmanager
def serving(folder: Path, dicomweb_url: str, triton_url: str) -> Iterator[tuple[str, Path]]:
    """`wetread serve` on these systems; its API and its data folder."""
    port = process.free_port()
    settings = {
        "data_dir": str(folder / "service"),
        "api": {"port": port},
        "pacs": {"url": dicomweb_url},
        "triton": {"url": triton_url},
    }
    file = folder / "wetread.yaml"
    file.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "middleware.cli", "serve", "--config", str(file)]
    api = f"http://127.0.0.1:{port}"
    with process.start("wetread serve", command, folder / "service.log") as service:
        service.wait_until(lambda: process.answers(f"{api}/ready", 5.0), 60.0)
        yield api, folder / "service"


def read_by_service(api: str, data_dir: Path, study_uid: str) -> Reading:
    """Announce the study and wait until every delivery arrived; times are those that the service wrote down."""
    with httpx.Client(base_url=api, trust_env=False, timeout=30) as client:
        job_id = (
            client.post("/events/study", json={"study_instance_uid": study_uid}).raise_for_status().json()["job_id"]
        )
        deadline = time.monotonic() + READING_TIMEOUT_S
        while not _arrived(client, job_id):
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"not delivered within {READING_TIMEOUT_S:g} s: {client.get(f'/jobs/{job_id}').json()}"
                )
            time.sleep(0.5)
    store = Store(open_engine(f"sqlite:///{data_dir}/wetread.sqlite"))
    began = min(event.received_at for event in store.events_of_job(job_id))
    ended = max(delivery.updated_at for delivery in store.deliveries(job_id=job_id))
    steps = {run.step: run.duration_s for run in store.step_runs(job_id)}
    store.close()
    return Reading((ended - began).total_seconds(), steps)


def _arrived(client: httpx.Client, job_id: str) -> bool:
    """Whether the reading is released and delivered; RuntimeError where it ended otherwise."""
    job, deliveries = client.get(f"/jobs/{job_id}").json(), client.get(f"/jobs/{job_id}/deliveries").json()
    if job["state"] not in ("accepted", "reading", "released") or any(d["state"] == "dead" for d in deliveries):
        raise RuntimeError(f"the reading ended {job['state']}: {job['reasons']} {deliveries}")
    return job["state"] == "released" and bool(deliveries) and all(d["state"] == "delivered" for d in deliveries)


def step_output_bytes(data_dir: Path) -> list[int]:
    """The size of every step output in the workflow store, ascending."""
    connection = sqlite3.connect(data_dir / "workflow.sqlite")
    rows = connection.execute("select length(cast(coalesce(output, '') as blob)) from operation_outputs").fetchall()
    connection.close()
    return sorted(int(size) for (size,) in rows)


def measure(warm_readings: int = WARM_READINGS) -> tuple[list[Reading], list[float], list[int]]:
    """Readings by the service (the first one cold), seconds of the plain script for the same studies, output sizes.

    Each study is read by both, in changing order; the first turn counts as cold for both.
    """
    with tempfile.TemporaryDirectory(prefix="wetread-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        study = real_study()
        models = build_truth_repository(folder / "models", study.gland, study.zones, study.lesion)
        triton = stack.enter_context(BundledTriton(models))
        orthanc = stack.enter_context(start_orthanc(folder / "pacs"))
        api, data_dir = stack.enter_context(serving(folder, orthanc.dicomweb_url, triton.grpc_url))
        readings: list[Reading] = []
        plain_s: list[float] = []
        for number in range(warm_readings + 1):
            study_uid, files = copy_with_fresh_uids(number, folder / f"study-{number}")
            asyncio.run(store(orthanc.dicomweb_url, files, study_uid))
            calls: list[Callable[[], None]] = [
                lambda uid=study_uid: readings.append(read_by_service(api, data_dir, uid)),  # type: ignore[misc]
                lambda uid=study_uid: plain_s.append(  # type: ignore[misc]
                    _timed(lambda: read_plainly(uid, orthanc.dicomweb_url, triton.grpc_url))
                ),
            ]
            for call in calls if number % 2 == 0 else calls[::-1]:
                call()
        return readings, plain_s, step_output_bytes(data_dir)


def _timed(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def bench_end_to_end() -> list[Row]:
    """The rows of the table."""
    readings, plain_s, sizes = measure()
    cold, warm = readings[0], readings[1:]
    else_s = statistics.median(r.else_s for r in warm)
    wall_else_s = statistics.median(r.wall_else_s for r in warm)
    wall_s, rival_s = statistics.median(r.wall_s for r in warm), statistics.median(plain_s[1:])
    p99 = sizes[min(len(sizes) - 1, int(len(sizes) * 0.99))]
    steps = {step: statistics.median(r.steps_s.get(step, 0.0) for r in warm) for step in warm[0].steps_s}
    return [
        Row(
            "real study, steps but fetch and inference, warm",
            "s",
            else_s,
            budget=f"<= {ELSE_BUDGET_S:g} s",
            within=else_s <= ELSE_BUDGET_S,
        ),
        *(Row(f"    {step}", "s", seconds) for step, seconds in steps.items()),
        Row("real study, steps but fetch and inference, first after start", "s", cold.else_s),
        Row("real study, event to last delivery, but fetch and inference", "s", wall_else_s),
        Row(
            "real study, event to last delivery",
            "s",
            wall_s,
            rival=rival_s,
            rival_name="plain script",
            ratio=wall_s / rival_s,
        ),
        Row(
            f"step output, p99 of {len(sizes)} (largest {sizes[-1]} bytes)",
            "bytes",
            p99,
            budget=f"<= {STEP_OUTPUT_BUDGET_BYTES} bytes",
            within=p99 <= STEP_OUTPUT_BUDGET_BYTES,
        ),
    ]


def main() -> int:
    """Print each row; 1 where one is over budget."""
    rows = bench_end_to_end()
    print("\n".join(row.line() for row in rows))
    return 0 if all(row.within is not False for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
