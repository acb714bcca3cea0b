"""Bytes by digest (fsspec): a folder by default, object storage where `artifacts_url` says so."""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import fsspec

FRESH = timedelta(days=1)
"""What was put so lately need not be written again to count as new."""


@dataclass(frozen=True)
class Ref:
    """Where bytes are: sha256 digest (hex) and size."""

    digest: str
    size_bytes: int


class ArtifactStore:
    """Content-addressed bytes. Writing the same bytes twice stores them once; a file appears whole or not at all."""

    def __init__(self, url: str) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(url)
        self._is_local = "file" in self._fs.protocol
        self._fs.makedirs(self._root, exist_ok=True)

    def put(self, data: bytes) -> Ref:
        """Store `data`; OSError where the store is full or read-only. What is there already counts as new again, so
        that nobody removes it for its age before it is written down who needs it."""
        digest = hashlib.sha256(data).hexdigest()
        path = self._path(digest)
        if not self._is_fresh(path):
            self._fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            # A plain folder can hold half a file after a crash, so the name appears by rename; an object
            # store's upload is whole by itself.
            target = f"{path}.{uuid.uuid4().hex}.part" if self._is_local else path
            with self._fs.open(target, "wb") as file:
                file.write(data)
                if self._is_local:  # the record of it will outlive a power failure, so the bytes must too
                    file.flush()
                    os.fsync(file.fileno())
            if self._is_local:
                self._fs.mv(target, path)
        return Ref(digest, len(data))

    def get(self, digest: str) -> bytes:
        """The bytes of `digest`. Raises FileNotFoundError, or ValueError where they no longer match it."""
        with self._fs.open(self._path(digest), "rb") as file:
            data: bytes = file.read()
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"artifact {digest[:12]} is damaged: its bytes do not match its digest")
        return data

    def _is_fresh(self, path: str) -> bool:
        try:
            return datetime.now(UTC) - self._modified(path) < FRESH
        except FileNotFoundError:
            return False

    def _modified(self, path: str) -> datetime:
        at: datetime = self._fs.modified(path)
        return at.replace(tzinfo=UTC) if at.tzinfo is None else at

    def find_unneeded(self, before: datetime, needed: Collection[str]) -> Iterator[tuple[str, int]]:
        """Paths and sizes (bytes) of what was last put before, and is not among the digests that somebody needs; also
        of half files that a crash left. `before` must be older than `FRESH`."""
        self._fs.invalidate_cache()  # others write here, too
        for path, info in self._fs.find(self._root, detail=True).items():
            if path.rsplit("/", 1)[-1] not in needed and (info.get("LastModified") or self._modified(path)) < before:
                yield path, int(info["size"] or 0)

    def remove(self, path: str) -> None:
        """Remove one of those; nothing where it is gone already."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(path)

    def put_json(self, value: Any) -> Ref:
        """Store a JSON value."""
        return self.put(json.dumps(value, sort_keys=True).encode())

    def _path(self, digest: str) -> str:
        return f"{self._root}/{digest[:2]}/{digest}"


def read_answer(artifacts: ArtifactStore, digest: str) -> Any:
    """What a destination answered: the value where it is JSON that can be passed on, else text, None where it is no
    longer kept."""
    try:
        text = artifacts.get(digest).decode(errors="replace")
    except (OSError, ValueError):
        return None
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        return value
    except (ValueError, RecursionError):
        return text
