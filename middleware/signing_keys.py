"""`wetread keys`: make the keys of the sign-in at the EHR, change them with overlap, and see which one is in use."""

import json
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from connectors.fhir.keys import SigningKey, add_key, published, read_keys, signing_key
from middleware.errors import SettingsError


def make_signing_key(file: Path, algorithm: str, overlap_s: float, screen: Console) -> None:
    """Add a key to the JWK set `file`, or begin one, and print what happens when. The file is replaced whole, so that
    a service that reads it meanwhile has the keys from before or after."""
    try:
        before: dict[str, Any] = {}
        if file.exists():
            read_keys([file])
            before = _read_set(file)
        _replace(file, json.dumps(add_key(before, algorithm, time.time(), overlap_s), indent=2).encode())
        keys = read_keys([file])
    except (OSError, ValueError) as error:
        raise SettingsError(f"keys new: {error}") from None
    _print_keys(keys, screen)
    if keys[0].begins_at > time.time():
        screen.print("The new key is published from now on and signs later, once the EHR has seen it.", soft_wrap=True)
    else:
        screen.print("Register the public keys at the EHR before you sign in: see `wetread keys list --jwks`.")


def list_signing_keys(files: Sequence[Path], as_jwks: bool, screen: Console) -> None:
    """Print the keys of the files with their times, or the public JWK set to register at the EHR."""
    try:
        keys = read_keys(files)
    except ValueError as error:
        raise SettingsError(f"keys list: {error}") from None
    if as_jwks:
        text = json.dumps(published(keys, time.time()), indent=2)
        screen.print(text, soft_wrap=True, markup=False)
        return
    _print_keys(keys, screen)


def _read_set(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    if not data.lstrip().startswith(b"{"):
        raise ValueError(f"{file}: is a PEM key, which has no place for times; give the new key a JWK set of its own")
    document: dict[str, Any] = json.loads(data)
    return document


def _replace(file: Path, data: bytes) -> None:
    """Write the file whole, readable for nobody but who could read it before (at first its owner alone)."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as target:
            target.write(data)
            target.flush()
            os.fsync(target.fileno())
        if file.exists():
            known = file.stat()
            os.chmod(name, known.st_mode & 0o777)
            os.chown(name, known.st_uid, known.st_gid)
        os.replace(name, file)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise


def _print_keys(keys: Sequence[SigningKey], screen: Console) -> None:
    now = time.time()
    try:
        in_use = signing_key(keys, now).kid
    except ValueError:
        in_use = ""
    table = Table(Column("kid", overflow="fold"), "algorithm", "state", "signs from", "published until")
    for key in keys:
        table.add_row(key.kid, key.algorithm, _state(key, in_use, now), _show(key.begins_at), _show(key.ends_at))
    screen.print(table)


def _state(key: SigningKey, in_use: str, now: float) -> str:
    if key.kid == in_use:
        return "signs"
    if now >= key.ends_at:
        return "ended"
    return "next" if now < key.begins_at else "still published"


def _show(moment: float) -> str:
    """A time to read, `-` for one that is not set (the beginning of time, or its end)."""
    try:
        return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M UTC}" if moment > 0 else "-"
    except (OverflowError, ValueError, OSError):
        return "-"
