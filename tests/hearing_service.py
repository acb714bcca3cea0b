"""The `wetread` command, except that the studies of finished orders are looked for every second."""

from middleware import cli, listening


def main() -> None:
    """Run the command."""
    listening.LOOK_AGAIN_S = 1.0
    cli.main()
