"""The simulator hospital's PACS: a real Orthanc with its DICOMweb plugin, on loopback.

Without Orthanc on the machine (`orthanc_available()` false) the service's own folder PACS takes its place.
"""

import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from deploy.hospital.process import LOOPBACK, ServerProcess, answers, free_port, start

# Debian's package puts the server in sbin, which is not in every user's PATH.
ORTHANC = shutil.which("Orthanc") or "/usr/sbin/Orthanc"
DICOMWEB_PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
START_TIMEOUT_S = 30.0


class RunningOrthanc:
    """Orthanc at `http_url` (its REST API) and `dicomweb_url`. A context manager that stops on exit."""

    def __init__(self, http_port: int, process: ServerProcess) -> None:
        self.http_url = f"http://{LOOPBACK}:{http_port}"
        self.dicomweb_url = f"{self.http_url}/dicom-web"
        self.process = process

    def stop(self) -> None:
        """End the server; its storage stays in the work folder."""
        self.process.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def orthanc_available() -> bool:
    """Whether Orthanc and its DICOMweb plugin are installed."""
    return Path(ORTHANC).exists() and DICOMWEB_PLUGIN.exists()


def start_orthanc(
    workdir: Path, *, http_port: int | None = None, dicom_port: int | None = None, stable_age_s: int = 1
) -> RunningOrthanc:
    """Start Orthanc with its storage under `workdir`, ready when its REST API answers.

    Studies stored there before are still there. `stable_age_s` is how long a study must rest before
    `/changes` lists it as StableStudy. C-STORE and the like only where a `dicom_port` is given: Orthanc
    would listen there on every interface. Raises `ServerNotReady`.
    """
    http = http_port or free_port()
    workdir.mkdir(parents=True, exist_ok=True)
    config = workdir / "orthanc.json"
    config.write_text(json.dumps(_configuration(workdir, http, dicom_port, stable_age_s), indent=2))
    process = start("PACS (Orthanc)", [ORTHANC, str(config)], workdir / "orthanc.log")
    process.wait_until(lambda: answers(f"http://{LOOPBACK}:{http}/system"), START_TIMEOUT_S)
    return RunningOrthanc(http, process)


def _configuration(workdir: Path, http_port: int, dicom_port: int | None, stable_age_s: int) -> dict[str, Any]:
    storage = str((workdir / "orthanc-storage").resolve())
    return {
        "Name": "Simulator PACS",
        "HttpPort": http_port,
        "DicomServerEnabled": dicom_port is not None,
        "DicomPort": dicom_port or 4242,
        "DicomAet": "HOSPITAL",
        # Only loopback callers are answered, hence no accounts.
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "StorageDirectory": storage,
        "IndexDirectory": storage,
        "StableAge": stable_age_s,
        # What is stored twice under one SOP Instance UID is kept once, as first received.
        "OverwriteInstances": False,
        "Plugins": [str(DICOMWEB_PLUGIN)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "EnableWado": False, "Ssl": False},
    }
