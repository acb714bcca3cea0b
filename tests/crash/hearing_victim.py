"""The hearing part of the service alone, to be killed: the real listener, inbox and tables, no readings.

Arguments: data_dir and port. Ends when it is told to (SIGTERM) or killed.
"""

import asyncio
import sys
from pathlib import Path

from middleware import telemetry
from middleware.bootstrap import open_systems
from middleware.listening import listen_to_messages
from middleware.settings import HearingSettings, Settings


async def _hear(settings: Settings) -> None:
    async with open_systems(settings) as systems, listen_to_messages(systems):
        await asyncio.Event().wait()


def main() -> None:
    """Listen until the end."""
    telemetry.configure_logging()
    folder, port = sys.argv[1:]
    asyncio.run(_hear(Settings(data_dir=Path(folder), hl7_listener=HearingSettings(port=int(port)))))
