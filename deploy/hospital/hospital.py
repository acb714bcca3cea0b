"""The simulator hospital: PACS, EHR, Triton and RIS, each real where it can be, wired for one service."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import yaml

from deploy.hospital.ehr import RunningEhr, start_ehr
from deploy.hospital.pacs import RunningOrthanc, orthanc_available, start_orthanc
from deploy.hospital.ris_process import RunningRis, start_ris
from deploy.triton.bundled import BundledTriton

MODELS = Path(__file__).resolve().parents[1] / "triton" / "models"

Told = Callable[[str, str, float], None]
"""Called as each system is up: its name, what it is, seconds it took."""

Server = TypeVar("Server")


@dataclass(frozen=True)
class Hospital:
    """The running systems. `orthanc` is None where the PACS fell back to the folder `pacs_folder`."""

    workdir: Path
    orthanc: RunningOrthanc | None
    pacs_folder: Path
    ehr: RunningEhr
    ris: RunningRis
    triton: BundledTriton

    def settings(self, api_port: int, **changes: Any) -> dict[str, Any]:
        """Settings of a service that is wired to this hospital; `changes` replace top-level ones."""
        pacs = {"url": self.orthanc.dicomweb_url} if self.orthanc else {"folder": str(self.pacs_folder)}
        return {
            "data_dir": str(self.workdir / "service"),
            "executor_id": "demo",
            "site": {"sending_facility": "SIMULATOR", "time_zone": "Europe/Amsterdam"},
            "api": {"port": api_port},
            "pacs": pacs,
            # The phantom and public studies are dated years back, where no hospital's watch would look.
            "pacs_watch": {"interval_s": 0.5, "recent_days": 20000},
            "completeness": {"quiet_s": 1.0},
            "ehr": {"url": self.ehr.url},
            "ris": {
                "host": self.ris.host,
                "port": self.ris.port,
                "duplicate_safe": True,
                "ack_timeout_s": 10,
                "receiving_facility": "SIMULATOR",
            },
            "triton": {"url": self.triton.grpc_url},
            **changes,
        }

    def write_settings(self, api_port: int, **changes: Any) -> Path:
        """Write `wetread.yaml` into the work folder and give its path."""
        file = self.workdir / "wetread.yaml"
        file.write_text(yaml.safe_dump(self.settings(api_port, **changes), sort_keys=False), encoding="utf-8")
        return file


@contextmanager
def open_hospital(workdir: Path, *, models: Path = MODELS, told: Told = lambda *_: None) -> Iterator[Hospital]:
    """Start every system at once (the EHR takes longest) and stop them all at the end, however that comes."""
    with ExitStack() as stack, ThreadPoolExecutor(4) as pool:

        def up(
            name: str, start: Callable[[], AbstractContextManager[Server]], describe: Callable[[Server], str]
        ) -> Server:
            began = perf_counter()
            server = stack.enter_context(start())
            told(name, describe(server), perf_counter() - began)
            return server

        ehr = pool.submit(up, "EHR", lambda: start_ehr(workdir / "ehr"), lambda s: f"{s.kind} at {s.url}")
        triton = pool.submit(up, "Triton", lambda: BundledTriton(models), lambda s: f"tritonserver at {s.grpc_url}")
        ris = pool.submit(up, "RIS", lambda: start_ris(workdir / "ris"), lambda s: f"MLLP at {s.host}:{s.port}")
        orthanc = None
        if orthanc_available():
            orthanc = up("PACS", lambda: start_orthanc(workdir / "pacs"), lambda s: f"Orthanc at {s.dicomweb_url}")
        else:
            told("PACS", f"fallback: the folder {workdir / 'pacs-folder'} (Orthanc is not installed)", 0.0)
        yield Hospital(workdir, orthanc, workdir / "pacs-folder", ehr.result(), ris.result(), triton.result())
