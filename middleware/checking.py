"""`wetread check`: does every configured system answer?"""

from dataclasses import dataclass
from typing import Any

from connectors.errors import ConnectorError
from middleware.bootstrap import open_systems
from middleware.settings import Settings


@dataclass(frozen=True)
class Probe:
    """What one system answered, or why it did not."""

    system: str
    configured: bool
    answers: bool
    text: str


async def probe_all(settings: Settings) -> list[Probe]:
    """Ask the store and each system, one after the other."""
    async with open_systems(settings) as systems:
        systems.store.ping()
        probes = [Probe("store", True, True, systems.settings.store_url.split("@")[-1])]
        named: tuple[tuple[str, Any, str], ...] = (
            ("pacs", systems.pacs, "not configured: set pacs.url (results stay in the artifact store)"),
            ("orthanc", systems.changes, "not configured: set orthanc_changes.url where the PACS is Orthanc"),
            ("ehr", systems.ehr, "not configured: set ehr.url (no context, no DiagnosticReport)"),
            ("ris", systems.ris, "not configured: set ris.host and ris.port (no ORU)"),
            ("triton", systems.model, ""),
        )
        return [*probes, *[await _probe(name, system, otherwise) for name, system, otherwise in named]]


async def _probe(name: str, system: Any, otherwise: str) -> Probe:
    if system is None:
        return Probe(name, False, False, otherwise)
    try:
        return Probe(name, True, True, await system.probe())
    except ConnectorError as error:
        return Probe(name, True, False, str(error))
