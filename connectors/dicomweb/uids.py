"""DICOM UIDs as they may stand in a URL or a file name."""

import re

from connectors.errors import Permanent

_UID = re.compile(r"[0-9]+(\.[0-9]+)*")


def checked_uid(uid: str, what: str) -> str:
    """`uid` itself if it is a DICOM UID (PS3.5 9.1); Permanent otherwise, before it can end up in a path."""
    if len(uid) > 64 or not _UID.fullmatch(uid):
        raise Permanent(f"{what} is not a DICOM UID: only digits and dots, 64 characters at most.")
    return uid
