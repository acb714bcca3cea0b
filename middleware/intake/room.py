"""Whether there is room for more: intake stops before the disk is full, so that what was begun can be finished."""

import errno
import shutil
from pathlib import Path

MIB = 1 << 20


class NoRoom(OSError):
    """The disk is nearly full; the message names the folder and what to do. Later there may be room again."""

    def __init__(self, reason: str) -> None:
        super().__init__(errno.ENOSPC, reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


def check_room(folder: Path, min_free_mib: int) -> None:
    """Raise NoRoom where the disk of `folder` has less than `min_free_mib` left (0: any is enough)."""
    if not min_free_mib:
        return
    free_mib = shutil.disk_usage(folder).free // MIB
    if free_mib < min_free_mib:
        raise NoRoom(
            f"the disk of {folder} has {free_mib} MiB left, less than storage.min_free_mib={min_free_mib}; "
            "nothing new is accepted until there is more"
        )
