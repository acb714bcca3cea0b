"""The private keys that sign our sign-in at a FHIR server, and the public parts that it checks them with.

RS384 (RSA of 2048 bits or more) and ES384 (EC P-384): SMART App Launch 2.2, "Client Authentication: Asymmetric".
A key file is one key in PEM, a JWK or a JWK set (RFC 7517). A JWK may say from when it signs (`nbf`) and until when it
is published (`exp`), in seconds since 1970 as OpenID Federation 1.0 does for historical keys: so keys overlap and
change hands by the clock.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from joserfc.errors import JoseError
from joserfc.jwk import ECKey, RSAKey

Json = dict[str, Any]

ALGORITHMS = {"EC": "ES384", "RSA": "RS384"}
_KINDS: dict[str, type[ECKey] | type[RSAKey]] = {"EC": ECKey, "RSA": RSAKey}
_CURVE = "P-384"
_LEAST_RSA_BITS = 2048
_NEW_RSA_BITS = 3072
_LARGEST_FILE_BYTES = 1 << 20
_WANTED = f"RSA of {_LEAST_RSA_BITS} bits or more (RS384) or EC on {_CURVE} (ES384)"


@dataclass(frozen=True)
class SigningKey:
    """One private key: its name at the server, and when it signs and is published (seconds since 1970)."""

    kid: str
    algorithm: str
    key: ECKey | RSAKey = field(repr=False)
    begins_at: float = 0.0
    ends_at: float = math.inf

    def public(self) -> Json:
        """The public JWK. Nothing of it is secret."""
        parts: Mapping[str, Any] = dict(self.key.as_dict(private=False).items())
        kept = {name: parts[name] for name in ("kty", "crv", "x", "y", "n", "e") if name in parts}
        return {**kept, "kid": self.kid, "alg": self.algorithm, "use": "sig", "key_ops": ["verify"]}


def read_keys(files: Iterable[Path]) -> tuple[SigningKey, ...]:
    """Every key of the files, in their order. Raises ValueError naming the file and what is wrong with it."""
    keys = tuple(key for file in files for key in _read_file(file))
    names = [key.kid for key in keys]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two keys have the kid {name!r}; keep one of them")
    return keys


def signing_key(keys: Sequence[SigningKey], now: float) -> SigningKey:
    """The key in use: of those that have begun and not ended, the one that began last; of several, the first.

    Raises ValueError where there is none.
    """
    in_use = [key for key in keys if key.begins_at <= now < key.ends_at]
    if not in_use:
        raise ValueError("no key is in use: each has ended or not begun yet; make one with `wetread keys new`")
    return max(in_use, key=lambda key: key.begins_at)


def published(keys: Sequence[SigningKey], now: float) -> Json:
    """The public JWK set: every key that has not ended, those still to begin among them."""
    return {"keys": [key.public() for key in keys if now < key.ends_at]}


def add_key(document: Mapping[str, Any], algorithm: str, now: float, overlap_s: float) -> Json:
    """The private JWK set with a new key that signs after `overlap_s` seconds; the others end that long after it.

    The first key of a set signs at once. Keys that have ended are left out. Raises ValueError where a key waits to
    begin already: two changes at once would end a key that nobody has seen.
    """
    kept = [each for each in _entries(document) if now < _moment(each, "exp", math.inf)]
    if waiting := [each for each in kept if _moment(each, "nbf", 0.0) > now]:
        raise ValueError(f"key {waiting[0].get('kid')!r} waits to begin already; let it begin first")
    begins_at = math.ceil(now + overlap_s) if kept else math.floor(now)
    ends_at = math.ceil(begins_at + overlap_s)
    ending = [{**each, "exp": min(_moment(each, "exp", math.inf), ends_at)} for each in kept]
    return {"keys": [_new_key(algorithm, begins_at), *ending]}


class KeyRing:
    """The keys of some files, read again whenever a file has changed.

    A file that cannot be used any more leaves the keys that were read before in use: whoever edits it must not
    interrupt work. `read_keys` tells what is wrong.
    """

    def __init__(self, files: Sequence[Path], clock: Callable[[], float] = time.time) -> None:
        self._files = tuple(files)
        self._clock = clock
        self._seen: tuple[object, ...] = ()
        self._keys: tuple[SigningKey, ...] = ()

    def signing_key(self) -> SigningKey:
        """The key in use. Raises ValueError where there is none."""
        return signing_key(self._current(), self._clock())

    def published(self) -> Json:
        """The public JWK set. Raises ValueError where no file was ever readable."""
        return published(self._current(), self._clock())

    def _current(self) -> tuple[SigningKey, ...]:
        try:
            seen = tuple(_mark(file) for file in self._files)
            if seen != self._seen:
                self._keys, self._seen = read_keys(self._files), seen
        except (OSError, ValueError) as error:
            if not self._keys:
                raise ValueError(str(error)) from error
        return self._keys


def _mark(file: Path) -> tuple[int, int, int]:
    known = file.stat()
    return known.st_mtime_ns, known.st_size, known.st_ino


def _read_file(file: Path) -> Iterator[SigningKey]:
    try:
        with file.open("rb") as source:
            data = source.read(_LARGEST_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from error
    if len(data) > _LARGEST_FILE_BYTES:
        raise ValueError(f"{file}: is larger than {_LARGEST_FILE_BYTES} bytes, so no file of keys")
    try:
        yield from _from_json(data) if data.lstrip()[:1] == b"{" else [_from_pem(data)]
    except ValueError as error:
        # Without the cause: a library's message may quote what it could not read.
        raise ValueError(f"{file}: {error}") from None


def _from_pem(data: bytes) -> SigningKey:
    """A key in PEM; its kid is its thumbprint (RFC 7638)."""
    if b"ENCRYPTED" in data:
        raise ValueError("the key is encrypted; store it decrypted and let only the service read the file")
    if b"PRIVATE KEY-----" not in data:
        raise ValueError("is neither a private key in PEM nor a JWK set")
    if data.count(b"-----BEGIN") > 1:
        raise ValueError("holds more than one PEM block; give each key a file of its own")
    for kind in _KINDS.values():
        try:
            key = kind.import_key(data)
        except (JoseError, ValueError, TypeError):
            continue
        return _usable(key, key.thumbprint(), {})
    raise ValueError(f"the PEM block is damaged or of another kind; needed is {_WANTED}")


def _from_json(data: bytes) -> Iterator[SigningKey]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("is not valid JSON") from None
    entries = _entries(document)
    if not entries:
        raise ValueError("holds no key")
    for number, entry in enumerate(entries, 1):
        try:
            yield _from_jwk(entry)
        except ValueError as error:
            raise ValueError(f"key {number}: {error}") from None


def _entries(document: Mapping[str, Any]) -> list[Json]:
    """The keys of a JWK set, or the one JWK that stands in the place of a set."""
    entries = document.get("keys", []) if "keys" in document or not document else [document]
    if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        raise ValueError("`keys` must be a list of JWKs")
    return entries


def _from_jwk(entry: Json) -> SigningKey:
    kid, kty = entry.get("kid"), entry.get("kty")
    if not isinstance(kid, str) or not kid:
        raise ValueError("has no kid; give it the one by which the server knows it")
    if kty not in _KINDS:
        raise ValueError(f"kty {str(kty)[:20]!r} cannot be used; needed is {_WANTED}")
    if entry.get("alg", ALGORITHMS[kty]) != ALGORITHMS[kty]:
        raise ValueError(f"alg must be {ALGORITHMS[kty]}")
    bare = {name: value for name, value in entry.items() if name not in ("use", "key_ops", "nbf", "exp", "iat")}
    try:
        key = _KINDS[kty].import_key(bare)
    except (JoseError, ValueError, TypeError, KeyError):
        raise ValueError(f"the numbers of the JWK are missing or damaged; needed is {_WANTED}") from None
    return _usable(key, kid, entry)


def _usable(key: ECKey | RSAKey, kid: str, entry: Json) -> SigningKey:
    if not key.is_private:
        raise ValueError("is a public key; the private one is needed")
    if isinstance(key, ECKey) and key.curve_name != _CURVE:
        raise ValueError(f"is on the curve {key.curve_name}; needed is {_WANTED}")
    if isinstance(key, RSAKey) and key.raw_value.key_size < _LEAST_RSA_BITS:
        raise ValueError(f"has {key.raw_value.key_size} bits; needed is {_WANTED}")
    begins_at, ends_at = _moment(entry, "nbf", 0.0), _moment(entry, "exp", math.inf)
    return SigningKey(kid, ALGORITHMS[key.key_type], key, begins_at, ends_at)


def _moment(entry: Mapping[str, Any], name: str, otherwise: float) -> float:
    value = entry.get(name, otherwise)
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ValueError(f"{name} must be a number of seconds since 1970")
    return float(value)


def _new_key(algorithm: str, begins_at: float) -> Json:
    key = ECKey.generate_key(_CURVE) if algorithm == ALGORITHMS["EC"] else RSAKey.generate_key(_NEW_RSA_BITS)
    parts = key.as_dict(private=True)
    return {**parts, "kid": key.thumbprint(), "alg": algorithm, "use": "sig", "nbf": int(begins_at)}
