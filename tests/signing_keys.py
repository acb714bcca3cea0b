"""Private keys for the tests of the sign-in, as files, and what a server would be told of them."""

import json
from pathlib import Path
from typing import Any

from joserfc.jwk import ECKey, RSAKey

Json = dict[str, Any]


def make_key(kind: str = "ES384") -> ECKey | RSAKey:
    """A new private key of the kind that signs RS384 or ES384."""
    return ECKey.generate_key("P-384") if kind == "ES384" else RSAKey.generate_key(2048)


def write_pem(file: Path, key: ECKey | RSAKey) -> Path:
    """The key as a PEM file."""
    file.write_bytes(key.as_pem(private=True))
    return file


def write_set(file: Path, *entries: Json) -> Path:
    """A JWK set of these entries."""
    file.write_text(json.dumps({"keys": list(entries)}))
    return file


def entry(key: ECKey | RSAKey, kid: str | None = "key-1", **more: object) -> Json:
    """The private JWK, with a name and whatever else is said of it."""
    named = {"kid": kid} if kid is not None else {}
    return {**key.as_dict(private=True), **named, **more}
