"""The MLLP connector against python-hl7's server, and against peers that misbehave."""

import asyncio
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import hl7
import pytest
from hl7.mllp import HL7StreamReader, HL7StreamWriter, start_hl7_server

from connectors.errors import Ambiguous, Permanent, Retryable
from connectors.mllp.acknowledgement import Refused
from connectors.mllp.client import MllpClient
from connectors.mllp.config import MllpConfig

Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def oru(control_id: str = "C1") -> bytes:
    header = f"MSH|^~\\&|WETREAD|SITE|RIS|SITE|20240101120000+0000||ORU^R01^ORU_R01|{control_id}|P|2.5.1"
    return f"{header}\rPID|1||X\rOBR|1\rOBX|1|TX|1||text\r".encode()


def ack(control_id: str, code: str = "AA", extra: str = "") -> bytes:
    header = "MSH|^~\\&|RIS|SITE|WETREAD|SITE|20240101120001+0000||ACK^R01^ACK|A1|P|2.5.1"
    return f"\x0b{header}\rMSA|{code}|{control_id}{extra}\r\x1c\r".encode()


@asynccontextmanager
async def peer_and_client(peer: Peer, **settings: object) -> AsyncIterator[MllpClient]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await peer(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    client = MllpClient(MllpConfig.model_validate({"host": "127.0.0.1", "port": port, "ack_timeout_s": 5, **settings}))
    try:
        yield client
    finally:
        await client.aclose()
        server.close()
        await server.wait_closed()


async def received(reader: asyncio.StreamReader) -> bytes:
    return await reader.readuntil(b"\x1c\r")


def answering(*pieces: bytes, pause_s: float = 0.0, then_stay: bool = True) -> Peer:
    """A peer that answers every message with these pieces, each sent by itself."""

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                await received(reader)
            except asyncio.IncompleteReadError:
                return
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(pause_s)
            if not then_stay:
                return

    return peer


async def test_python_hl7_server_gets_the_message_and_its_ack_is_returned() -> None:
    seen: list[hl7.Message] = []

    async def ris(reader: HL7StreamReader, writer: HL7StreamWriter) -> None:
        while not writer.is_closing():
            try:
                message = await reader.readmessage()
            except asyncio.IncompleteReadError:
                return
            seen.append(message)
            writer.writemessage(message.create_ack())
            await writer.drain()

    async with await start_hl7_server(ris, host="127.0.0.1", port=0) as server:
        port = server.sockets[0].getsockname()[1]
        client = MllpClient(MllpConfig(host="127.0.0.1", port=port))
        first, second = await client.send(oru("C1"), "C1"), await client.send(oru("C2"), "C2")
        await client.aclose()
        server.close()
    assert [first.code, second.code] == ["AA", "AA"]
    assert [first.control_id, second.control_id] == ["C1", "C2"]
    assert [str(message["MSH.F10"]) for message in seen] == ["C1", "C2"]


async def test_messages_of_many_callers_go_one_by_one_over_one_connection() -> None:
    connections, in_flight, most = 0, 0, 0

    async def ris(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections, in_flight, most
        connections += 1
        while True:
            try:
                message = await received(reader)
            except asyncio.IncompleteReadError:
                return
            in_flight += message.count(b"\x0b")
            most = max(most, in_flight)
            await asyncio.sleep(0.01)
            in_flight -= 1
            writer.write(ack(message.split(b"|")[9].decode()))

    async with peer_and_client(ris) as client:
        answers = await asyncio.gather(*(client.send(oru(f"C{n}"), f"C{n}") for n in range(8)))
    assert [answer.control_id for answer in answers] == [f"C{n}" for n in range(8)]
    assert (connections, most) == (1, 1)


@pytest.mark.parametrize("pieces", [[bytes([byte]) for byte in ack("C1")], [b"noise\r\n" + ack("C1") + b"tail"]])
async def test_answer_is_found_however_it_is_cut(pieces: list[bytes]) -> None:
    async with peer_and_client(answering(*pieces)) as client:
        assert (await client.send(oru(), "C1")).code == "AA"


async def test_answer_to_another_message_does_not_count() -> None:
    async with peer_and_client(answering(ack("OTHER") + ack("C1", "AA", "|right one"))) as client:
        answer = await client.send(oru(), "C1")
    assert (answer.control_id, answer.text) == ("C1", "right one")


async def test_only_foreign_answers_are_ambiguous_and_counted() -> None:
    async with peer_and_client(answering(ack("OTHER"), ack("ELSE")), ack_timeout_s=0.3) as client:
        with pytest.raises(Ambiguous, match="2 answers to other control ids"):
            await client.send(oru(), "C1")


@pytest.mark.parametrize("code", ["AE", "CE", "AR", "CR"])
async def test_refusals_are_permanent_with_code_and_text(code: str) -> None:
    answer = ack("C1", code, "|Unknown order\rERR||PID^1|204^Unknown key identifier^HL70357|E||||no such order")
    async with peer_and_client(answering(answer)) as client:
        with pytest.raises(Refused, match=r"Unknown order; 204 Unknown key identifier no such order") as refusal:
            await client.send(oru(), "C1")
        assert refusal.value.code == code
        # The connection survives: it was answered.
        assert (await client.probe()).startswith("ris: 127.0.0.1")
    assert ("rejected it" in str(refusal.value)) == code.endswith("R")


async def test_enhanced_mode_takes_the_commit_or_waits_for_the_application() -> None:
    both = ack("C1", "CA") + ack("C1", "AA")
    async with peer_and_client(answering(both)) as client:
        assert (await client.send(oru(), "C1")).code == "CA"
    async with peer_and_client(answering(both), wait_for_application_ack=True) as client:
        assert (await client.send(oru(), "C1")).code == "AA"
    only_commit = peer_and_client(answering(ack("C1", "CA")), wait_for_application_ack=True, ack_timeout_s=0.3)
    async with only_commit as client:
        with pytest.raises(Ambiguous, match=r"a commit \(CA\) but no application answer"):
            await client.send(oru(), "C1")


@pytest.mark.parametrize(
    ("pieces", "told"),
    [
        ((), "nothing came"),
        ((b"\x0bMSH|^~\\&|RIS\rMSA|AA|C1\r",), "outside of whole frames"),
        ((b"\x0bhello\x1c\r",), "1 messages without a readable MSA"),
        ((b"\x0bMSH|^~\\&|RIS\rMSA|OK|C1\r\x1c\r",), "without a readable MSA"),
    ],
)
async def test_silence_and_nonsense_after_sending_are_ambiguous(pieces: tuple[bytes, ...], told: str) -> None:
    async with peer_and_client(answering(*pieces), ack_timeout_s=0.3) as client:
        with pytest.raises(Ambiguous, match=told):
            await client.send(oru(), "C1")


async def test_connection_that_ends_after_sending_is_ambiguous() -> None:
    async with peer_and_client(answering(then_stay=False)) as client:
        with pytest.raises(Ambiguous, match="the connection ended"):
            await client.send(oru(), "C1")


async def test_oversized_answer_is_ambiguous_and_ends_early() -> None:
    async with peer_and_client(answering(b"\x0b" + b"x" * 5000), max_ack_bytes=1000) as client:
        with pytest.raises(Ambiguous, match="more than 1000 bytes"):
            await asyncio.wait_for(client.send(oru(), "C1"), 3)


async def test_late_answer_to_an_ambiguous_message_never_meets_the_next_one() -> None:
    connections = 0

    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        message = await received(reader)
        await asyncio.sleep(0.4 if connections == 1 else 0)
        writer.write(ack(message.split(b"|")[9].decode()))
        await writer.drain()

    async with peer_and_client(late, ack_timeout_s=0.2) as client:
        with pytest.raises(Ambiguous):
            await client.send(oru("C1"), "C1")
        assert (await client.send(oru("C2"), "C2")).control_id == "C2"
    assert connections == 2


async def test_connection_closed_while_idle_is_opened_anew() -> None:
    connections = 0

    async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        message = await received(reader)
        # The second frame is unasked for: it must not hide that the connection ends behind it.
        writer.write(ack(message.split(b"|")[9].decode()) + ack("UNASKED"))
        await writer.drain()

    async with peer_and_client(closing) as client:
        for control_id in ("C1", "C2", "C3"):
            assert (await client.send(oru(control_id), control_id)).code == "AA"
            await asyncio.sleep(0.05)
    assert connections == 3


async def test_close_that_the_event_loop_has_not_seen_yet_is_noticed_too() -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def answer_once_each_connection() -> None:
        for _ in range(2):
            peer, _ = listener.accept()
            with peer:
                message = peer.recv(65536)
                peer.sendall(ack(message.split(b"|")[9].decode()))

    ris = threading.Thread(target=answer_once_each_connection, daemon=True)
    ris.start()
    client = MllpClient(MllpConfig(host="127.0.0.1", port=listener.getsockname()[1], ack_timeout_s=5))
    assert (await client.send(oru("C1"), "C1")).code == "AA"
    # Held up on purpose: the close arrives while the loop cannot look.
    time.sleep(0.2)  # noqa: ASYNC251
    assert (await client.send(oru("C2"), "C2")).code == "AA"
    await client.aclose()
    listener.close()


async def test_cancelled_send_drops_the_connection() -> None:
    async with peer_and_client(answering()) as client:
        sending = asyncio.create_task(client.send(oru(), "C1"))
        await asyncio.sleep(0.1)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert client._connection is None


async def test_refused_connection_is_retryable(free_port: int) -> None:
    client = MllpClient(MllpConfig(host="127.0.0.1", port=free_port))
    with pytest.raises(Retryable, match="Check that the receiver runs"):
        await client.send(oru(), "C1")
    with pytest.raises(Retryable):
        await client.probe()


@pytest.mark.parametrize(
    ("message", "control_id"),
    [(oru("C1"), "C2"), (b"", "C1"), (b"PID|1", "C1"), (oru("C1") + b"\x1c", "C1"), (oru("C1") + b"\x0b", "C1")],
)
async def test_bad_messages_are_refused_before_connecting(message: bytes, control_id: str, free_port: int) -> None:
    with pytest.raises(Permanent):
        await MllpClient(MllpConfig(host="127.0.0.1", port=free_port)).send(message, control_id)


async def test_probe_sends_nothing() -> None:
    heard = b""

    async def listening(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal heard
        heard += await reader.read()

    async with peer_and_client(listening) as client:
        assert "is connected (TCP)" in await client.probe()
    assert heard == b""


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A self-signed certificate for localhost, and its key."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*request, *names, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    return cert, key


@asynccontextmanager
async def tls_peer(certificate: tuple[Path, Path]) -> AsyncIterator[int]:
    """A receiver that speaks TLS 1.2 or newer, and asks for a client certificate signed like its own."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=certificate[0])
    context.load_cert_chain(*certificate)
    context.verify_mode = ssl.CERT_REQUIRED
    server = await asyncio.start_server(answering(ack("C1")), "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def test_tls_with_client_certificate(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    async with tls_peer(certificate) as port:
        config = MllpConfig(
            host="127.0.0.1", port=port, tls=True, ca_file=cert, client_cert_file=cert, client_key_file=key
        )
        client = MllpClient(config)
        assert "is connected (TLS)" in await client.probe()
        for _ in range(2):
            assert (await client.send(oru(), "C1")).code == "AA"
        await client.aclose()


async def test_untrusted_certificate_is_permanent(certificate: tuple[Path, Path]) -> None:
    async with tls_peer(certificate) as port:
        with pytest.raises(Permanent, match="not trusted"):
            await MllpClient(MllpConfig(host="127.0.0.1", port=port, tls=True)).probe()


@pytest.fixture
def free_port(unused_tcp_port: int) -> int:
    return unused_tcp_port
