"""A disk that fills up under the running service: intake stops in order, nothing accepted is lost, and all goes on by
itself once there is room. The disk is a small one of its own (tmpfs; mounting needs root, as the other servers do)."""

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import hl7
import httpx
import pytest

from deploy.hospital.process import LOOPBACK, answers, free_port
from middleware.intake.inbox import accept_study
from middleware.store.queries import Store, open_engine
from tests.commands import environment, zygote
from tests.hl7_inbox import write_order
from tests.serving import Service

DISK_MIB, MIN_FREE_MIB = 48, 8
UID = "1.2.826.0.1.99.7"


class SmallDisk:
    """The service on a disk of its own, which can be filled and freed."""

    def __init__(self, folder: Path, min_free_mib: int) -> None:
        self.hl7_port = free_port()
        settings = {"hl7_listener": {"port": self.hl7_port}, "storage": {"min_free_mib": min_free_mib}}
        self.service = Service(folder, {**settings, "retry": {"attempts": 1, "first_wait_s": 0.1}})
        self.ballast = self.service.data_dir / "ballast"

    def fill(self) -> None:
        """Leave not a byte."""
        with self.ballast.open("wb", buffering=0) as file:
            try:
                while file.write(b"x" * 65536) == 65536:
                    pass
            except OSError:
                pass

    def free(self) -> None:
        self.ballast.unlink()

    def post(self, number: int) -> httpx.Response:
        return self.service.http.post("/events/study", json={"study_instance_uid": f"{UID}.{number}"})

    def send(self, control_id: str) -> list[str]:
        """MSA-1, MSA-2 and ERR-3 of the answer to an order."""
        raw = write_order(control_id, "NW", (f"P-{control_id}", "", "", ""), patient="MRN")
        with socket.create_connection((LOOPBACK, self.hl7_port), timeout=20) as connection:
            connection.sendall(b"\x0b" + raw + b"\x1c\r")
            received = b""
            while not received.endswith(b"\x1c\r"):
                received += connection.recv(65536)
        message = hl7.parse(received.strip(b"\x0b\x1c\r").decode())
        answer = [str(message.segment("MSA")[1]), str(message.segment("MSA")[2])]
        return [*answer, str(message.segment("ERR")[3]).partition("^")[0]] if answer[0] != "AA" else answer


def start_without_room(service: Service) -> None:
    """Start it; it lives, though it is not ready."""
    env = environment(service.folder / "tmp")
    service.pid = zygote().start(
        "middleware.cli:main", ["serve"], service.folder, env, service.folder / "out", service.folder / "service.log"
    )
    deadline = time.monotonic() + 60
    while not answers(f"{service.api}/health"):
        assert time.monotonic() < deadline, service.log()
        time.sleep(0.1)
    assert service.http.get("/ready").status_code == 503


def until(is_so: Callable[[], bool], within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


@pytest.fixture
def disk_folder(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "wetread-test", str(place)], check=True)
    yield place / "service"
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize("min_free_mib", [MIN_FREE_MIB, 0], ids=["watermark", "the last byte"])
def test_intake_stops_while_the_disk_is_full_and_goes_on_by_itself(disk_folder: Path, min_free_mib: int) -> None:
    disk = SmallDisk(disk_folder, min_free_mib)
    disk.service.start()
    try:
        assert disk.post(1).status_code == 202
        assert disk.send("before") == ["AA", "before"]
        disk.service.wait_until_settled(f"{UID}.1")
        disk.fill()
        refused = disk.post(2)
        assert refused.status_code == 503, refused.text
        assert "again later" in refused.json()["detail"]
        assert disk.send("while") == ["AR", "while", "207"]
        until(lambda: disk.service.http.get("/ready").status_code == 503)
        reason = disk.service.http.get("/ready").json()["store"]
        assert ("storage.min_free_mib=8" in reason) if min_free_mib else (reason == "is full or read-only")
        assert disk.service.http.get("/health").status_code == 200
        disk.free()
        until(lambda: disk.service.http.get("/ready").status_code == 200)
        assert disk.post(2).status_code in (200, 202)
        assert disk.send("while") == ["AA", "while"]
        for number in (1, 2):
            assert disk.service.wait_until_settled(f"{UID}.{number}")["state"] == "failed"  # no PACS is configured
    finally:
        assert disk.service.stop() == 0
    assert "Traceback" not in disk.service.log()


def test_what_was_accepted_waits_for_room(disk_folder: Path) -> None:
    """Nothing is fetched below the watermark; the reading waits and is not given up."""
    disk = SmallDisk(disk_folder, MIN_FREE_MIB)
    disk.service.data_dir.mkdir()
    disk.ballast.write_bytes(b"x" * (DISK_MIB - MIN_FREE_MIB // 2 << 20))
    engine = open_engine(f"sqlite:///{disk.service.data_dir}/wetread.sqlite")
    accept_study(Store(engine), f"{UID}.3", source="test", key="3", now=datetime.now().astimezone())
    engine.dispose()
    start_without_room(disk.service)
    try:
        time.sleep(2.0)
        assert disk.service.jobs(f"{UID}.3")[0]["state"] == "accepted"
        disk.free()
        assert disk.service.wait_until_settled(f"{UID}.3")["state"] == "failed"  # no PACS is configured
    finally:
        assert disk.service.stop() == 0
