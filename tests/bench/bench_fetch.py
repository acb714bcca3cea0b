"""Measures the WADO-RS study fetch against curl, and its memory on a large study.

Run: python -m tests.bench.bench_fetch [--repetitions 21] [--mebibytes 512] [--folder DIR]
Both write to memory (/dev/shm) where there is room: on a disk, ext4 walks around every inode freed in the last
minutes when it creates a file, which charges the tests that ran before to us, who create one file an instance.
Prints name, ours, rival, ratio, budget; exits 1 where a budget is broken.
"""

import argparse
import asyncio
import json
import multiprocessing
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pydicom

from connectors.dicomweb.client import DicomwebClient
from connectors.dicomweb.config import DicomwebConfig
from connectors.dicomweb.retrieve import ACCEPT_ANY_TRANSFER_SYNTAX

STUDY = Path(__file__).parents[3] / "shared" / "data" / "prostatex-0000" / "images"
RATIO_BUDGET = 1.4
MEMORY_BUDGET_MIB = 64
INSTANCE_BYTES = 512 * 1024
BOUNDARY = b"--3f0b8f0a-6f0e-4f39-9f5c-0c5d1d0c7a11"
DICOMWEB_PLUGIN = "/usr/share/orthanc/plugins/libOrthancDicomWeb.so"


@dataclass(frozen=True)
class Result:
    name: str
    ours: float
    rival: float | None
    ratio: float | None
    budget: float
    unit: str

    @property
    def kept(self) -> bool:
        return (self.ours if self.ratio is None else self.ratio) <= self.budget

    def line(self) -> str:
        rival = "-" if self.rival is None else f"{self.rival:.4g}"
        ratio = "-" if self.ratio is None else f"{self.ratio:.2f}"
        budget = f"{self.budget:g}{'x' if self.ratio is not None else ' ' + self.unit}"
        verdict = "ok" if self.kept else "OVER"
        return f"{self.name:<34} {self.ours:>10.4g} {rival:>10} {ratio:>7} {budget:>9}  {self.unit:<4} {verdict}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def orthanc(folder: Path) -> Iterator[str]:
    """A fresh Orthanc on loopback; gives its DICOMweb root."""
    port = free_port()
    settings = {
        "HttpPort": port,
        "HttpBindAddresses": ["127.0.0.1"],
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomServerEnabled": False,
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "index"),
        "Plugins": [DICOMWEB_PLUGIN],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    log = (folder / "orthanc.log").open("wb")
    server = subprocess.Popen(["Orthanc", str(folder / "orthanc.json")], stdout=log, stderr=log)
    try:
        wait_until_up(f"http://127.0.0.1:{port}/system")
        yield f"http://127.0.0.1:{port}/dicom-web"
    finally:
        server.terminate()
        server.wait(10)


def wait_until_up(url: str) -> None:
    for _ in range(300):
        try:
            httpx.get(url, trust_env=False)
        except httpx.TransportError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"{url} did not come up within 30 s")


def multipart_server(port: int, instances: int) -> None:
    """Serves one synthetic study of `instances` x 512 KiB without Content-Length on its parts; never returns."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        while True:
            peer, _ = listener.accept()
            # A caller that only looks whether the port is open is gone by now.
            with peer, suppress(OSError):
                send_study(peer, instances)


def send_study(peer: socket.socket, instances: int) -> None:
    instance = bytes(range(256)) * (INSTANCE_BYTES // 256)
    part = BOUNDARY + b"\r\nContent-Type: application/dicom\r\n\r\n"
    peer.recv(65536)
    peer.sendall(
        b'HTTP/1.1 200 OK\r\nContent-Type: multipart/related; boundary="'
        + BOUNDARY[2:]
        + b'"\r\nConnection: close\r\n\r\n'
    )
    for _ in range(instances):
        peer.sendall(part)
        peer.sendall(instance)
        peer.sendall(b"\r\n")
    peer.sendall(BOUNDARY + b"--\r\n")


@contextmanager
def synthetic_study(mebibytes: int) -> Iterator[str]:
    port = free_port()
    instances = mebibytes * 1024 * 1024 // INSTANCE_BYTES
    server = multiprocessing.get_context("spawn").Process(target=multipart_server, args=(port, instances))
    server.start()
    try:
        wait_for_port(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.join(10)


def wait_for_port(port: int) -> None:
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError("the synthetic server did not come up within 10 s")


def curl_s(url: str, to: Path) -> float:
    """Seconds that curl itself reports for the transfer: without the start of its process."""
    command = ["curl", "-s", "-f", "--noproxy", "*", "-o", str(to), "-w", "%{time_total}"]
    done = subprocess.run(
        [*command, "-H", f"Accept: {ACCEPT_ANY_TRANSFER_SYNTAX}", url], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


async def fetch_s(client: DicomwebClient, study_uid: str, into: Path) -> float:
    started = time.perf_counter()
    await client.fetch_study(study_uid, into)
    return time.perf_counter() - started


async def against_curl(name: str, root: str, study_uid: str, folder: Path, repetitions: int) -> Result:
    """Both in turn, in changing order, each to a fresh place; medians, first round not counted."""
    client = DicomwebClient(DicomwebConfig(url=root))
    ours, rival = [], []
    for turn in range(repetitions + 1):
        for mine in (turn % 2 == 0, turn % 2 == 1):
            if mine:
                ours.append(await fetch_s(client, study_uid, folder / "fetched"))
                shutil.rmtree(folder / "fetched")
            else:
                rival.append(await asyncio.to_thread(curl_s, f"{root}/studies/{study_uid}", folder / "curl.bin"))
                (folder / "curl.bin").unlink()
    await client.aclose()
    mine_s, curl = statistics.median(ours[1:]), statistics.median(rival[1:])
    return Result(name, mine_s * 1000, curl * 1000, mine_s / curl, RATIO_BUDGET, "ms")


def resident_mib(field: str = "VmHWM") -> float:
    """Resident memory of this process from /proc: VmHWM is its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def memory_of_fetch(root: str, folder: str, report: Callable[[float], None]) -> None:
    """Reports MiB by which the peak grew during the fetch, in a process of its own."""

    async def fetch() -> None:
        client = DicomwebClient(DicomwebConfig(url=root))
        before = resident_mib("VmRSS")
        await client.fetch_study("1.2.3", Path(folder) / "memory")
        report(resident_mib("VmHWM") - before)
        await client.aclose()

    asyncio.run(fetch())


def memory(root: str, folder: Path, mebibytes: int) -> Result:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=memory_of_fetch, args=(root, str(folder), answers.put))
    process.start()
    grown_mib = answers.get(timeout=300)
    process.join(30)
    return Result(f"extra memory, {mebibytes} MiB study", grown_mib, None, None, MEMORY_BUDGET_MIB, "MiB")


async def load(root: str) -> str:
    """Stores the real study; gives its UID."""
    client = DicomwebClient(DicomwebConfig(url=root))
    files = sorted(STUDY.rglob("*.dcm"))
    study_uid = str(pydicom.dcmread(files[0], stop_before_pixels=True).StudyInstanceUID)
    outcomes = await client.store(files, study_uid)
    await client.aclose()
    if not all(outcome.stored for outcome in outcomes):
        raise RuntimeError("Orthanc did not take the real study")
    return study_uid


def spool_folder(mebibytes: int) -> str | None:
    """A folder in memory where there is room, None (the usual temporary folder) where there is not."""
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and shutil.disk_usage(shared).free > 4 * mebibytes * 1024 * 1024
    return str(shared) if roomy else None


def run(repetitions: int, mebibytes: int, where: str | None) -> list[Result]:
    with tempfile.TemporaryDirectory(dir=where) as name:
        folder = Path(name)
        with orthanc(folder) as root:
            study_uid = asyncio.run(load(root))
            real = asyncio.run(against_curl("fetch, real study, Orthanc", root, study_uid, folder, repetitions))
        with synthetic_study(mebibytes) as root:
            large_name = f"fetch, {mebibytes} MiB study"
            large = asyncio.run(against_curl(large_name, root, "1.2.3", folder, max(3, repetitions // 4)))
            return [real, large, memory(root, folder, mebibytes)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=21)
    parser.add_argument("--mebibytes", type=int, default=512)
    parser.add_argument("--folder", help="where both write; in memory if not given and there is room")
    wanted = parser.parse_args()
    results = run(wanted.repetitions, wanted.mebibytes, wanted.folder or spool_folder(wanted.mebibytes))
    print(f"{'name':<34} {'ours':>10} {'rival':>10} {'ratio':>7} {'budget':>9}")
    print("\n".join(result.line() for result in results))
    return 0 if all(result.kept for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
