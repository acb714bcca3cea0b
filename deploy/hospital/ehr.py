"""The simulator hospital's EHR: HAPI FHIR's JPA server (R4), or a small in-memory server without Java.

`start_ehr(workdir)` starts whichever this machine can run. HAPI is built once with Maven from
`deploy/hospital/hapi` into `.cache/hapi` (git-ignored), keyed by the sources, and starts from there
without network ever after; a class-data archive (JEP 310/350) recorded at build time halves its start.
`python -m deploy.hospital.ehr --build` builds it ahead of time.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from xml.etree import ElementTree

from deploy.hospital.process import LOOPBACK, ServerNotReady, ServerProcess, answers, free_port, start

PROJECT = Path(__file__).with_name("hapi")
CACHE = Path(__file__).parents[2] / ".cache" / "hapi"
START_TIMEOUT_S = 180.0
BUILD_TIMEOUT_S = 900.0
# A short-lived server on few cores: the quick compiler and the plain collector start soonest.
JVM_OPTIONS = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xmx1g", "-Djava.awt.headless=true")


class EhrNotBuilt(RuntimeError):
    """HAPI could not be built here; the message says why."""


class RunningEhr:
    """A FHIR R4 server at `url` (no trailing slash), and which kind it is. A context manager."""

    def __init__(self, url: str, kind: str, process: ServerProcess) -> None:
        self.url = url
        self.kind = kind
        self.process = process

    def stop(self) -> None:
        """End the server; what it stored is gone."""
        self.process.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def start_ehr(workdir: Path, *, port: int | None = None, timeout_s: float = START_TIMEOUT_S) -> RunningEhr:
    """Start HAPI where Java and a build of it are to be had, else the in-memory fallback.

    `kind` of the result says which; why HAPI is not running is in `workdir/ehr-fallback-reason.txt`.
    """
    try:
        return start_hapi(workdir, port=port, timeout_s=timeout_s)
    except EhrNotBuilt as reason:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "ehr-fallback-reason.txt").write_text(f"{reason}\n")
        return start_fallback(workdir, port=port)


def start_hapi(workdir: Path, *, port: int | None = None, timeout_s: float = START_TIMEOUT_S) -> RunningEhr:
    """Start HAPI JPA (built first where it is not), ready when `/metadata` answers.

    Raises `EhrNotBuilt` without Java or Maven, `ServerNotReady` when it does not come up.
    """
    build = build_hapi()
    archive = build / "classes.jsa"
    options = (f"-XX:SharedArchiveFile={archive}",) if archive.exists() else ()
    return _run_hapi(build, workdir, options, port or free_port(), timeout_s)


def start_fallback(workdir: Path, *, port: int | None = None) -> RunningEhr:
    """Start the in-memory FHIR server in Python; ready when `/metadata` answers."""
    chosen = port or free_port()
    command = [sys.executable, "-m", "deploy.hospital.ehr_fallback", "--port", str(chosen)]
    process = start("EHR (fallback)", command, workdir / "ehr.log", cwd=Path(__file__).parents[2])
    url = f"http://{LOOPBACK}:{chosen}/fhir"
    process.wait_until(lambda: answers(f"{url}/metadata"), timeout_s=30)
    return RunningEhr(url, "fallback: in-memory FHIR", process)


def hapi_version() -> str:
    """The HAPI version that the launcher project asks for, e.g. `8.8.0`."""
    found = ElementTree.parse(PROJECT / "pom.xml").find(".//{*}hapi.version")
    assert found is not None
    assert found.text is not None
    return found.text


def build_hapi() -> Path:
    """Build HAPI once and return its folder (`ehr.jar`, `lib/`, `classes.jsa`).

    Safe against two processes building at the same time. Raises `EhrNotBuilt`.
    """
    build = CACHE / _sources_digest()
    if not (build / "ready").exists():
        _require("java", "mvn")
        CACHE.mkdir(parents=True, exist_ok=True)
        with _locked(CACHE / "lock"):
            if not (build / "ready").exists():
                _package(build)
                _record_class_archive(build)
                (build / "ready").touch()
    _require("java")
    return build


def _require(*programs: str) -> None:
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        raise EhrNotBuilt(f"{' and '.join(missing)} not found; install_debian.sh installs it")


def _sources_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in PROJECT.rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(PROJECT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _package(build: Path) -> None:
    shutil.rmtree(build, ignore_errors=True)
    command = ["mvn", "-q", "-B", f"-DbuildDirectory={build}", "package"]
    try:
        done = subprocess.run(
            command, cwd=PROJECT, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise EhrNotBuilt(f"Maven did not finish within {BUILD_TIMEOUT_S:g} s") from None
    if done.returncode != 0:
        errors = [line for line in done.stdout.splitlines() if "ERROR" in line][:3]
        raise EhrNotBuilt("Maven failed: " + " ".join(errors)[:600])


def _record_class_archive(build: Path) -> None:
    """Start once, use what the demo uses, and let the JVM write down the classes that this loaded.

    Without the archive HAPI only starts slower, so a failure here is left at that.
    """
    archive = build / "classes.jsa"
    with contextlib.suppress(ServerNotReady, OSError):
        options = (f"-XX:ArchiveClassesAtExit={archive}",)
        with _run_hapi(build, build, options, free_port(), START_TIMEOUT_S) as ehr:
            _exercise(ehr.url)


def _run_hapi(build: Path, workdir: Path, options: tuple[str, ...], port: int, timeout_s: float) -> RunningEhr:
    command = ["java", *JVM_OPTIONS, *options, "-jar", str(build / "ehr.jar"), str(port)]
    # Writing the class archive on exit takes the JVM some ten seconds.
    process = start("EHR (HAPI FHIR)", command, workdir / "ehr.log", stop_timeout_s=90)
    url = f"http://{LOOPBACK}:{port}/fhir"
    process.wait_until(lambda: answers(f"{url}/metadata"), timeout_s)
    return RunningEhr(url, f"HAPI FHIR {hapi_version()} JPA", process)


def _exercise(url: str) -> None:
    patient = {"resourceType": "Patient", "identifier": [{"system": "urn:oid:1.2.3.4.5", "value": "0"}]}
    entry = {"resource": patient, "request": {"method": "PUT", "url": "Patient?identifier=urn:oid:1.2.3.4.5|0"}}
    _post(url, {"resourceType": "Bundle", "type": "transaction", "entry": [entry]})
    _post(f"{url}/Patient/$validate", patient)
    answers(f"{url}/Patient?identifier=urn:oid:1.2.3.4.5%7C0")


def _post(url: str, resource: dict[str, Any]) -> None:
    request = urllib.request.Request(
        url, json.dumps(resource).encode(), {"Content-Type": "application/fhir+json"}, method="POST"
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as response:
        response.read()


def main() -> int:
    """`--build`: build HAPI ahead of time and say where it is, or why it cannot be."""
    if sys.argv[1:] != ["--build"]:
        print("usage: python -m deploy.hospital.ehr --build", file=sys.stderr)
        return 2
    try:
        print(f"HAPI FHIR {hapi_version()} JPA is built in {os.path.relpath(build_hapi())}")
    except EhrNotBuilt as reason:
        print(f"EHR: the in-memory fallback will be used: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
