"""The `wetread` command as another release of it was: the order of its steps has another version."""

import os

from middleware import app, bootstrap, checking, taking_over
from tests.crash import victim


def main() -> None:
    """Run it with the version that OTHER_VERSION names, and every point wrapped (see victim.py)."""
    version = os.environ["OTHER_VERSION"]
    for module in (app, bootstrap, checking, taking_over):
        module.WORKFLOW_VERSION = version  # type: ignore[attr-defined]
    victim.main()
