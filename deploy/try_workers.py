"""PostgreSQL, the service and n more workers on this host, on loopback, for trying Wetread on several processes.

    python -m deploy.try_workers -n 4 [--config wetread.yaml] [--folder DIR]

Everything is kept in the folder (a temporary one by default, gone afterwards). Without --config images come from
DIR/pacs, a folder of DICOM files. Needs Debian's PostgreSQL. Ctrl-C ends all of it. Not for patients: nothing is
backed up, and PostgreSQL asks for no password on loopback.
"""

import argparse
import os
import signal
import sys
import tempfile
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

from deploy.hospital.postgres import start_postgres
from deploy.hospital.process import LOOPBACK, ServerNotReady, ServerProcess, answers, free_port, start
from deploy.triton.bundled import BundledTriton, BundledTritonError
from middleware.bootstrap import MODELS

READY_WITHIN_S = 120.0


def run(count: int, folder: Path, config: Path | None) -> None:
    """Run everything until told to stop. Raises ServerNotReady, BundledTritonError."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        database = stack.enter_context(start_postgres(folder / "postgres"))
        shared = {"WETREAD_DATABASE_URL": database.url, "WETREAD_ARTIFACTS_URL": f"file://{folder}/artifacts"}
        shared |= {"WETREAD_CONFIG": str(config.resolve())} if config else _bare(folder)
        if not (config and "triton:" in config.read_text(encoding="utf-8")) and "WETREAD_TRITON__URL" not in os.environ:
            shared["WETREAD_TRITON__URL"] = stack.enter_context(BundledTriton(MODELS)).grpc_url
        port = free_port()
        service = stack.enter_context(_start("serve", "wetread-0", folder, {**shared, "WETREAD_API__PORT": str(port)}))
        service.wait_until(lambda: answers(f"http://{LOOPBACK}:{port}/ready", 5.0), READY_WITHIN_S)
        for number in range(1, count + 1):
            stack.enter_context(_start("worker", f"wetread-{number}", folder, shared))
        _tell(port, count, folder, config)
        _wait_for_the_end()


def _bare(folder: Path) -> dict[str, str]:
    (folder / "pacs").mkdir(exist_ok=True)
    empty = folder / "wetread.yaml"
    empty.write_text("# Everything is set in the environment.\n", encoding="utf-8")
    return {"WETREAD_CONFIG": str(empty), "WETREAD_PACS__FOLDER": str(folder / "pacs")}


def _start(command: str, name: str, folder: Path, env: dict[str, str]) -> ServerProcess:
    own = {"WETREAD_EXECUTOR_ID": name, "WETREAD_DATA_DIR": str(folder / name)}
    line = [sys.executable, "-m", "middleware.cli", command]
    return start(f"wetread {command}", line, folder / f"{name}.log", env={**os.environ, **env, **own})


def _tell(port: int, count: int, folder: Path, config: Path | None) -> None:
    print(f"The service answers at http://{LOOPBACK}:{port}, {count} more worker(s) beside it. Logs: {folder}/*.log")
    if config is None:
        print(f"Put a study's DICOM files into {folder}/pacs, then say so:")
    print(f'  curl --json \'{{"study_instance_uid": "..."}}\' http://{LOOPBACK}:{port}/events/study')
    print("Kill any of them (kill -9): the others go on with what it was doing. Ctrl-C ends all.", flush=True)


def _wait_for_the_end() -> None:
    ended = threading.Event()
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, lambda *_: ended.set())
    ended.wait()


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m deploy.try_workers", description=__doc__.partition("\n")[0])
    parser.add_argument("-n", "--workers", type=int, default=2, help="workers beside the service")
    parser.add_argument("--config", type=Path, help="settings file: your PACS, EHR, RIS and Triton")
    parser.add_argument("--folder", type=Path, help="where everything is kept; default: a temporary folder")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="wetread-workers-") as temporary, suppress(KeyboardInterrupt):
        Path(temporary).chmod(0o755)  # PostgreSQL's own user passes through it
        try:
            run(asked.workers, (asked.folder or Path(temporary)).resolve(), asked.config)
        except (ServerNotReady, BundledTritonError) as error:
            print(f"Cannot start: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
