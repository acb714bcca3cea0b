"""Runs `wetread serve` as a fork (see zygote.py), asks it and ends it."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import yaml

from deploy.hospital.process import LOOPBACK, free_port
from tests.commands import environment, zygote

SETTLED = ("delivered", "dead", "ambiguous")


class Service:
    """The service of one data_dir; it can be killed and started again on the same port."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.port = free_port()
        self.api = f"http://{LOOPBACK}:{self.port}"
        self.http = httpx.Client(base_url=self.api, timeout=30, trust_env=False)
        self.data_dir = folder / "data"
        self.pid = 0
        (folder / "tmp").mkdir(parents=True)
        own = {"data_dir": str(self.data_dir), "api": {"port": self.port}, "executor_id": "test"}
        (folder / "wetread.yaml").write_text(yaml.safe_dump({**own, **settings}), encoding="utf-8")

    def start(self, command: str = "middleware.cli:main", **more: str) -> None:
        """Start it, and return when it is ready."""
        env = environment(self.folder / "tmp", **more)
        self.pid = zygote().start(
            command, ["serve"], self.folder, env, self.folder / "service.out", self.folder / "service.log"
        )
        deadline = time.monotonic() + 60
        while not self.answers():
            assert Path(f"/proc/{self.pid}").exists(), f"it ended while starting:\n{self.log()[-3000:]}"
            assert time.monotonic() < deadline, self.log()[-3000:]
            time.sleep(0.03)

    def answers(self) -> bool:
        """Whether it is ready."""
        try:
            return self.http.get("/ready").status_code == 200
        except httpx.HTTPError:
            return False

    def stop(self) -> int:
        """End it as a supervisor does; its exit code."""
        os.kill(self.pid, signal.SIGTERM)
        return zygote().wait(self.pid, 60)

    def kill(self) -> None:
        """End it as a power cut does."""
        os.kill(self.pid, signal.SIGKILL)
        zygote().wait(self.pid, 10)

    def wait_for_death(self, timeout_s: float) -> int:
        """Its exit code once it has ended by itself."""
        return zygote().wait(self.pid, timeout_s)

    def announce(self, study_uid: str, **headers: str) -> httpx.Response | None:
        """Say that a study is there; None where the service is gone before it answers."""
        try:
            return self.http.post("/events/study", json={"study_instance_uid": study_uid}, headers=headers)
        except httpx.HTTPError:
            return None

    def jobs(self, study_uid: str) -> list[dict[str, Any]]:
        """The readings of a study."""
        found: list[dict[str, Any]] = self.http.get(f"/studies/{study_uid}/jobs").json()
        return found

    def wait_until_settled(self, study_uid: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """The study's only job once its reading has ended and no delivery is under way, with its `deliveries`."""
        deadline = time.monotonic() + timeout_s
        while True:
            (job,) = self.jobs(study_uid)
            deliveries = self.http.get(f"/jobs/{job['job_id']}/deliveries").json()
            if job["state"] not in ("waiting", "accepted", "reading") and all(
                d["state"] in SETTLED for d in deliveries
            ):
                return {**job, "deliveries": deliveries}
            assert time.monotonic() < deadline, f"{job}\n{deliveries}\n{self.log()[-3000:]}"
            time.sleep(0.05)

    def log(self) -> str:
        """Everything that it logged."""
        file = self.folder / "service.log"
        return file.read_text(errors="replace") if file.exists() else ""
