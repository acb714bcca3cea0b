"""The MLLP listener over TLS and mutual TLS: who gets through the handshake, and that nobody else does harm."""

import asyncio
import datetime
import ipaddress
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from connectors.errors import Permanent
from connectors.mllp.client import MllpClient
from connectors.mllp.config import MllpConfig
from connectors.mllp.framing import encode_frame
from connectors.mllp.listener import MllpListener, MllpListenerConfig, Peer, ProblemKind
from tests.mllp_senders import Desk, answer, connected, ended, exchange, listening, order, until

NOW = datetime.datetime.now(datetime.UTC)


@dataclass
class Authority:
    """A certificate authority in a folder, and the files it issues."""

    folder: Path
    name: str

    def __post_init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)])
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        request = self._request(self._subject, self._key.public_key()).add_extension(constraints, critical=True)
        self.file = self.folder / f"{self.name}.pem"
        self.file.write_bytes(request.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, dns: str = "localhost", expired: bool = False) -> Path:
        """A PEM file with a certificate of this CN (none if empty) and SAN, and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        attributes = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Hospital")] if name else []
        common = [x509.NameAttribute(NameOID.COMMON_NAME, name)] if name else []
        names = x509.SubjectAlternativeName([x509.DNSName(dns), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        request = self._request(x509.Name([*attributes, *common]), key.public_key(), expired)
        certificate = request.add_extension(names, critical=False).sign(self._key, hashes.SHA256())
        secret = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        file = self.folder / f"{self.name}-{name or dns}-{expired}.pem"
        file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + secret)
        return file

    def _request(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, expired: bool = False
    ) -> x509.CertificateBuilder:
        until_then = NOW - datetime.timedelta(hours=1) if expired else NOW + datetime.timedelta(days=1)
        builder = x509.CertificateBuilder(issuer_name=self._subject, subject_name=subject, public_key=key)
        builder = builder.serial_number(x509.random_serial_number())
        return builder.not_valid_before(NOW - datetime.timedelta(days=1)).not_valid_after(until_then)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "hospital-ca")


def tls_settings(authority: Authority, mutual: bool = True, **more: object) -> dict[str, object]:
    settings = {"tls": True, "cert_file": authority.issue("wetread"), **more}
    return {**settings, "ca_file": authority.file} if mutual else settings


def sender(authority: Authority, certificate: Path | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority.file))
    if certificate:
        context.load_cert_chain(certificate)
    return context


async def refused(port: int, context: ssl.SSLContext) -> None:
    """Sends a message and expects no answer. In TLS 1.3 a sender learns only then that it was refused."""
    try:
        async with connected(port, ssl=context) as (reader, writer):
            writer.write(encode_frame(order("BAD")))
            await writer.drain()
            assert await asyncio.wait_for(reader.read(), 5) == b""
    except (ssl.SSLError, ConnectionError):
        pass


async def test_own_client_over_tls(authority: Authority) -> None:
    desk = Desk()
    async with listening(desk, **tls_settings(authority, mutual=False)) as listener:
        client = MllpClient(MllpConfig(host="127.0.0.1", port=listener.port, tls=True, ca_file=authority.file))
        assert [(await client.send(order(f"C{n}"), f"C{n}")).code for n in range(3)] == ["AA"] * 3
        await client.aclose()
    assert {peer.certificate_subject for peer, _ in desk.seen} == {None}
    assert desk.problems == []


async def test_own_client_over_mutual_tls_is_known_by_its_subject(authority: Authority) -> None:
    desk = Desk()
    async with listening(desk, **tls_settings(authority, allowed_subjects=["RIS.hospital"])) as listener:
        config = MllpConfig(
            host="127.0.0.1",
            port=listener.port,
            tls=True,
            ca_file=authority.file,
            client_cert_file=authority.issue("ris.hospital"),
        )
        client = MllpClient(config)
        assert (await client.send(order("C1"), "C1")).code == "AA"
        await client.aclose()
    assert desk.seen[0][0].certificate_subject == "O=Hospital, CN=ris.hospital"


async def test_large_message_and_pipelined_messages_over_tls(authority: Authority) -> None:
    desk = Desk()
    messages = [order(f"C{n}", "x" * (1 << 20 if n == 20 else n)) for n in range(50)]
    async with (
        listening(desk, **tls_settings(authority, mutual=False)) as listener,
        connected(listener.port, ssl=sender(authority)) as (reader, writer),
    ):
        writer.write(b"".join(map(encode_frame, messages)))
        assert [await answer(reader) for _ in messages] == [f"AA|C{n}" for n in range(50)]
    assert [message for _, message in desk.seen] == messages


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("case", ["none", "other authority", "expired"])
async def test_wrong_client_certificate_fails_in_the_handshake(
    authority: Authority, tmp_path: Path, case: str, version: ssl.TLSVersion
) -> None:
    desk = Desk()
    certificates = {
        "none": None,
        "other authority": Authority(tmp_path, "other-ca").issue("ris"),
        "expired": authority.issue("ris", expired=True),
    }
    context = sender(authority, certificates[case])
    context.minimum_version = context.maximum_version = version
    async with listening(desk, **tls_settings(authority)) as listener:
        await refused(listener.port, context)
        await until(lambda: desk.problems != [])
        async with connected(listener.port, ssl=sender(authority, authority.issue("ris"))) as streams:
            assert await exchange(streams, "GOOD") == "AA|GOOD"
    assert desk.control_ids == ["GOOD"]
    assert desk.kinds == [ProblemKind.NO_TLS]


@pytest.mark.parametrize(
    ("name", "dns", "allowed"),
    [
        ("ris", "ris.local", ["RIS"]),
        ("ris", "ris.local", ["other", "ris.local"]),
        ("", "ris.local", ["ris.local"]),
        ("ris", "ris.local", ["127.0.0.1"]),
    ],
)
async def test_allowed_subject_may_be_the_cn_or_a_san(
    authority: Authority, name: str, dns: str, allowed: list[str]
) -> None:
    desk = Desk()
    async with (
        listening(desk, **tls_settings(authority, allowed_subjects=allowed)) as listener,
        connected(listener.port, ssl=sender(authority, authority.issue(name, dns))) as streams,
    ):
        assert await exchange(streams, "C1") == "AA|C1"
    expected = f"O=Hospital, CN={name}" if name else "DNS:ris.local, IP Address:127.0.0.1"
    assert desk.seen[0][0].certificate_subject == expected


@pytest.mark.parametrize("allowed", ["ri", "ris.local.evil", "Hospital", "*", "CN=ris"])
async def test_certificate_outside_the_allow_list_is_not_heard(authority: Authority, allowed: str) -> None:
    desk = Desk()
    context = sender(authority, authority.issue("ris", "ris.local"))
    async with listening(desk, **tls_settings(authority, allowed_subjects=[allowed])) as listener:
        await refused(listener.port, context)
        await until(lambda: desk.problems != [] and listener.connections == 0)
    assert desk.seen == []
    assert desk.kinds == [ProblemKind.NOT_ALLOWED]
    assert desk.problems[0][0].certificate_subject == "O=Hospital, CN=ris"


async def test_optional_client_certificate_is_still_verified(authority: Authority, tmp_path: Path) -> None:
    desk = Desk()
    foreign = Authority(tmp_path, "other-ca").issue("ris")
    async with listening(desk, **tls_settings(authority, require_client_cert=False)) as listener:
        async with connected(listener.port, ssl=sender(authority)) as streams:
            assert await exchange(streams, "C1") == "AA|C1"
        await refused(listener.port, sender(authority, foreign))
    assert desk.control_ids == ["C1"]


async def test_plain_and_silent_connections_to_a_tls_port_do_no_harm(authority: Authority) -> None:
    desk = Desk()
    settings = tls_settings(authority, mutual=False, tls_handshake_timeout_s=0.4)
    async with (
        listening(desk, **settings) as listener,
        connected(listener.port, ssl=sender(authority)) as working,
        connected(listener.port) as plain,
        connected(listener.port) as silent,
    ):
        plain[1].write(encode_frame(order("PLAIN")))
        assert b"MSA" not in await ended(plain[0])
        assert await exchange(working, "C1") == "AA|C1"
        assert await ended(silent[0]) == b""
        await until(lambda: listener.connections == 1)
        assert await exchange(working, "C2") == "AA|C2"
    assert desk.control_ids == ["C1", "C2"]
    assert desk.kinds == [ProblemKind.NO_TLS] * 2


async def test_silent_handshakes_count_as_connections_and_make_way(authority: Authority) -> None:
    desk = Desk()
    settings = tls_settings(authority, mutual=False, max_connections=8)
    async with listening(desk, **settings) as listener:
        async with connected(listener.port, ssl=sender(authority)) as working:
            assert await exchange(working, "C1") == "AA|C1"
            silent = [(await asyncio.open_connection("127.0.0.1", listener.port))[1] for _ in range(50)]
            await until(lambda: len(desk.problems) == 43)
            assert listener.connections == 8
            assert await exchange(working, "C2") == "AA|C2"
            assert set(desk.kinds) == {ProblemKind.NO_ROOM}
        for writer in silent:
            writer.transport.abort()
        await until(lambda: listener.connections == 0)


async def test_sender_that_reads_late_gets_its_long_answers_over_tls(authority: Authority) -> None:
    async def long_answer(_: bytes, __: Peer) -> bytes | None:
        return b"MSH|" + b"y" * (8 << 20)

    config = MllpListenerConfig.model_validate({"port": 0, **tls_settings(authority, mutual=False)})
    async with (
        MllpListener(config, long_answer) as listener,
        connected(listener.port, ssl=sender(authority), limit=1 << 20) as (reader, writer),
    ):
        writer.write(encode_frame(order("C1")) * 3)
        await asyncio.sleep(0.3)
        for _ in range(3):
            received = await asyncio.wait_for(reader.readexactly(4 + (8 << 20) + 3), 5)
            assert (received[:5], received[-2:]) == (b"\x0bMSH|", b"\x1c\r")


async def test_evicted_peer_that_ignores_the_close_is_gone_at_once(authority: Authority) -> None:
    desk = Desk()
    settings = tls_settings(authority, mutual=False, max_connections=1)

    def handshake(port: int) -> ssl.SSLSocket:
        plain = socket.create_connection(("127.0.0.1", port))
        return sender(authority).wrap_socket(plain, server_hostname="localhost")

    async with listening(desk, **settings) as listener:
        with await asyncio.to_thread(handshake, listener.port):
            async with connected(listener.port, ssl=sender(authority)) as streams:
                assert await exchange(streams, "C1") == "AA|C1"
                await until(lambda: not listener._aside, within_s=0.5)
    assert desk.kinds == [ProblemKind.NO_ROOM]


async def test_oversized_message_over_tls_is_answered(authority: Authority) -> None:
    desk = Desk(problem_answer=b"MSH|^~\\&|W\rMSA|AR|BIG\r")
    settings = tls_settings(authority, mutual=False, max_message_bytes=1000)
    async with (
        listening(desk, **settings) as listener,
        connected(listener.port, ssl=sender(authority)) as (reader, writer),
    ):
        writer.write(encode_frame(order("BIG", "x" * 300_000)))
        assert await answer(reader) == "AR|BIG"
        assert await ended(reader) == b""
    assert desk.kinds == [ProblemKind.TOO_LARGE]


async def test_stop_over_tls_finishes_the_message_in_hand(authority: Authority) -> None:
    desk = Desk(delay_s=0.3)
    async with (
        listening(desk, **tls_settings(authority, mutual=False)) as listener,
        connected(listener.port, ssl=sender(authority)) as (reader, writer),
    ):
        writer.write(encode_frame(order("C1")))
        await until(lambda: desk.at_work == 1)
        stopping = asyncio.create_task(listener.aclose())
        assert await answer(reader) == "AA|C1"
        assert await ended(reader) == b""
        await asyncio.wait_for(stopping, 3)


def test_unusable_files_are_permanent_and_named(authority: Authority, tmp_path: Path) -> None:
    async def never(_: bytes, __: object) -> bytes | None:
        raise AssertionError

    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("not a certificate")
    for settings in ({"cert_file": nonsense}, {"cert_file": authority.issue("w"), "ca_file": nonsense}):
        with pytest.raises(Permanent, match="cert_file, key_file or ca_file"):
            MllpListener(MllpListenerConfig.model_validate({"tls": True, **settings}), never)
