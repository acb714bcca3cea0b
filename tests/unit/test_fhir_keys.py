"""The keys of the sign-in: what is refused and how it is told, which one signs, what is published, how they change."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from joserfc.jwk import ECKey, OctKey, RSAKey

from connectors.fhir.keys import KeyRing, add_key, published, read_keys, signing_key
from tests.signing_keys import entry, make_key, write_pem, write_set

EC, RSA = make_key("ES384"), make_key("RS384")
SECRET_PARTS = {"d", "p", "q", "dp", "dq", "qi", "oth", "k"}
DAY = 86_400.0


def encrypted() -> bytes:
    return EC.as_pem(private=True, password="s3cret")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "neither a private key in PEM nor a JWK set"),
        (b"not a key", "neither a private key in PEM nor a JWK set"),
        (b"-----BEGIN PRIVATE KEY-----\nQUJD\n-----END PRIVATE KEY-----\n", "damaged"),
        (EC.as_pem(private=True)[:-60], "damaged"),
        (EC.as_pem(private=False), "neither a private key"),
        (EC.as_pem(private=True) * 2, "more than one PEM block"),
        (encrypted(), "encrypted"),
        (ECKey.generate_key("P-256").as_pem(private=True), "on the curve P-256"),
        (RSAKey.generate_key(1024).as_pem(private=True), "1024 bits"),
        (b"{", "not valid JSON"),
        (b"{}", "holds no key"),
        (b'{"keys": 1}', "must be a list"),
        (b'{"keys": [1]}', "must be a list"),
        (b'{"keys": []}', "holds no key"),
        (b'{"kid": "x", "kty": "EC"}', "key 1: the numbers of the JWK are missing or damaged"),
        (b'{"kid": "x", "kty": "EC", "crv": "P-384", "x": 1, "y": [], "d": null}', "missing or damaged"),
        (b" " * (2 << 20), "larger than"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_reason(content: bytes, told: str, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=told) as refused:
        read_keys([file])
    assert str(refused.value).startswith(f"{file}: ")
    assert "QUJD" not in str(refused.value)


@pytest.mark.parametrize(
    ("second", "told"),
    [
        (entry(RSA, None), "key 2: has no kid"),
        (entry(RSA, ""), "key 2: has no kid"),
        (entry(RSA, "key-1"), "two keys have the kid 'key-1'"),
        (entry(RSA, "k", alg="RS256"), "key 2: alg must be RS384"),
        (entry(EC, "k", alg="ES256"), "key 2: alg must be ES384"),
        ({**EC.as_dict(private=False), "kid": "k"}, "key 2: is a public key"),
        ({**OctKey.generate_key(256).as_dict(private=True), "kid": "k"}, "key 2: kty 'oct' cannot be used"),
        (entry(ECKey.generate_key("P-521"), "k"), "key 2: is on the curve P-521"),
        (entry(RSA, "k", nbf="tomorrow"), "key 2: nbf must be a number"),
        (entry(RSA, "k", exp=True), "key 2: exp must be a number"),
    ],
)
def test_a_key_of_a_set_that_cannot_be_used_is_named(second: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        read_keys([write_set(tmp_path / "set.json", entry(EC, "key-1"), second)])


@pytest.mark.parametrize(("key", "algorithm"), [(EC, "ES384"), (RSA, "RS384")])
def test_a_pem_key_is_named_by_its_thumbprint_and_only_its_public_part_is_told(
    key: ECKey | RSAKey, algorithm: str, tmp_path: Path
) -> None:
    (read,) = read_keys([write_pem(tmp_path / "key.pem", key)])
    assert (read.kid, read.algorithm) == (key.thumbprint(), algorithm)
    told = read.public()
    assert not told.keys() & SECRET_PARTS
    assert (told["kid"], told["alg"], told["use"]) == (read.kid, algorithm, "sig")
    secret = key.as_dict(private=True)["d"]
    assert isinstance(secret, str)
    assert secret not in f"{read!r} {read} {told}"


def test_the_key_that_began_last_signs_and_what_has_not_ended_is_published(tmp_path: Path) -> None:
    keys = read_keys(
        [
            write_set(
                tmp_path / "set.json",
                entry(EC, "next", nbf=300),
                entry(RSA, "old", exp=400),
                entry(EC, "now", nbf=100),
                entry(RSA, "gone", exp=50),
            )
        ]
    )
    names = [[each["kid"] for each in published(keys, now)["keys"]] for now in (10, 200, 399, 400)]
    assert [signing_key(keys, now).kid for now in (10, 99, 100, 299, 300, 9e9)] == [
        *("old", "old", "now", "now", "next", "next")
    ]
    assert names == [["next", "old", "now", "gone"], ["next", "old", "now"], ["next", "old", "now"], ["next", "now"]]


def test_without_times_the_first_file_signs(tmp_path: Path) -> None:
    first, second = write_pem(tmp_path / "1.pem", EC), write_pem(tmp_path / "2.pem", RSA)
    assert signing_key(read_keys([first, second]), 0).algorithm == "ES384"
    assert signing_key(read_keys([second, first]), 0).algorithm == "RS384"


def test_where_every_key_has_ended_that_is_told(tmp_path: Path) -> None:
    keys = read_keys([write_set(tmp_path / "set.json", entry(EC, "a", exp=5), entry(RSA, "b", nbf=9))])
    with pytest.raises(ValueError, match="no key is in use"):
        signing_key(keys, 7)


def test_keys_change_hands_with_overlap(tmp_path: Path) -> None:
    """The key that signs was published a day before it began, and still is for a day after it ceased."""
    first = add_key({}, "ES384", 0, DAY)
    second = add_key(first, "ES384", 2 * DAY, DAY)
    third = add_key(second, "ES384", 6 * DAY, DAY)
    fourth = add_key(third, "ES384", 9 * DAY, DAY)
    changes = [(0.0, first), (2 * DAY, second), (6 * DAY, third), (9 * DAY, fourth)]
    assert [len(document["keys"]) for _, document in changes] == [1, 2, 2, 2]

    def at(now: float) -> Any:
        document = [each for since, each in changes if since <= now][-1]
        return read_keys([write_set(tmp_path / "at.json", *document["keys"])])

    signed = set()
    for now in (quarter * DAY / 4 for quarter in range(4 * 11)):
        kid = signing_key(at(now), now).kid
        signed.add(kid)
        for other in (max(now - DAY, 0), now, now + DAY - 1):
            assert kid in {each["kid"] for each in published(at(other), other)["keys"]}, (now / DAY, other / DAY)
    assert len(signed) == 4


def test_a_second_change_waits_for_the_first() -> None:
    changing = add_key(add_key({}, "ES384", 0, DAY), "ES384", 10, DAY)
    with pytest.raises(ValueError, match="waits to begin already"):
        add_key(changing, "ES384", 20, DAY)


def test_without_overlap_the_new_key_signs_at_once_and_the_others_end() -> None:
    changed = add_key(add_key({}, "ES384", 0, DAY), "RS384", 100, 0)
    assert [(each["nbf"], each.get("exp")) for each in changed["keys"]] == [(100, None), (0, 100)]


def rewrite(file: Path, content: Callable[[], object]) -> None:
    content()
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1_000_000))  # clocks of file systems may be coarse


def test_a_changed_file_is_read_again_and_a_broken_one_interrupts_nothing(tmp_path: Path) -> None:
    file = write_set(tmp_path / "set.json", entry(EC, "a"))
    ring = KeyRing([file])
    assert ring.signing_key().kid == "a"
    rewrite(file, lambda: write_set(file, entry(RSA, "b")))
    assert ring.signing_key().kid == "b"
    rewrite(file, lambda: file.write_text("{"))
    assert ring.signing_key().kid == "b"
    file.unlink()
    assert [each["kid"] for each in ring.published()["keys"]] == ["b"]
    write_set(file, entry(EC, "c"))
    assert ring.signing_key().kid == "c"
    with pytest.raises(ValueError, match=r"nowhere\.json"):
        KeyRing([tmp_path / "nowhere.json"]).signing_key()


def test_a_new_set_can_be_read(tmp_path: Path) -> None:
    document = add_key({}, "ES384", 1000, DAY)
    (key,) = read_keys([write_set(tmp_path / "set.json", *document["keys"])])
    assert json.dumps(document).count('"d"') == 1
    assert key.kid == document["keys"][0]["kid"]
