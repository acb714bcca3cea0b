"""The MLLP listener with senders that behave: python-hl7's client, our own client, and raw sockets."""

import asyncio
import time

import hl7
import pytest
from hl7.client import MLLPClient

from connectors.errors import Permanent
from connectors.mllp.client import MllpClient
from connectors.mllp.config import MllpConfig
from connectors.mllp.framing import FrameDecoder, encode_frame
from connectors.mllp.listener import MllpListener, MllpListenerConfig, Peer, Problem, ProblemKind
from tests.mllp_senders import (
    MIB,
    Desk,
    accept,
    answer,
    connected,
    ended,
    exchange,
    listening,
    order,
    until,
)


async def test_python_hl7_client_gets_its_answers() -> None:
    desk = Desk()

    def send(port: int) -> list[bytes]:
        with MLLPClient("127.0.0.1", port) as client:
            return [client.send_message(hl7.parse(order(f"C{n}").decode())) for n in range(3)]

    async with listening(desk) as listener:
        answers = await asyncio.to_thread(send, listener.port)
    parsed = [hl7.parse(one.strip(b"\x0b\x1c\r").decode()) for one in answers]
    assert [(str(one["MSA.F1"]), str(one["MSA.F2"])) for one in parsed] == [("AA", f"C{n}") for n in range(3)]
    assert desk.seen[0][1].rstrip(b"\r") == order("C0").rstrip(b"\r")
    assert desk.problems == []


async def test_own_client_sends_and_is_told_apart_by_address_and_port() -> None:
    desk = Desk()
    async with listening(desk) as listener:
        client = MllpClient(MllpConfig(host="127.0.0.1", port=listener.port))
        assert [(await client.send(order(f"C{n}"), f"C{n}")).code for n in range(3)] == ["AA"] * 3
        await client.aclose()
    assert desk.control_ids == ["C0", "C1", "C2"]
    peers = {peer for peer, _ in desk.seen}
    assert len(peers) == 1
    assert peers.pop().address == "127.0.0.1"


async def test_eight_connections_keep_each_their_order() -> None:
    desk = Desk()

    async def send_all(port: int, sender: int) -> list[str]:
        async with connected(port) as (reader, writer):
            writer.write(b"".join(encode_frame(order(f"S{sender}N{n}")) for n in range(500)))
            return [await answer(reader) for _ in range(500)]

    async with listening(desk) as listener:
        answers = await asyncio.gather(*(send_all(listener.port, sender) for sender in range(8)))
    for sender in range(8):
        expected = [f"S{sender}N{n}" for n in range(500)]
        assert answers[sender] == [f"AA|{one}" for one in expected]
        assert [one for one in desk.control_ids if one.startswith(f"S{sender}N")] == expected
    assert len(desk.seen) == 4000


async def test_next_message_waits_for_the_answer_while_other_connections_go_on() -> None:
    desk = Desk(delay_s=0.1)
    async with (
        listening(desk) as listener,
        connected(listener.port) as (reader, writer),
        connected(listener.port) as other,
    ):
        writer.write(encode_frame(order("A1")) + encode_frame(order("A2")))
        await until(lambda: desk.at_work == 1)
        assert await exchange(other, "B1") == "AA|B1"
        assert [await answer(reader), await answer(reader)] == ["AA|A1", "AA|A2"]
    # Two at work at one time: one of each connection, never A1 and A2.
    assert desk.most_at_work == 2
    assert [one for one in desk.control_ids if one.startswith("A")] == ["A1", "A2"]


@pytest.mark.parametrize("cut", [1, 2, 7, 1000])
async def test_messages_are_found_however_cut_joined_or_surrounded_by_noise(cut: int) -> None:
    desk = Desk()
    stream = b"\r\nnoise" + b"\x1c\r".join(encode_frame(order(f"C{n}")) + b"\n" for n in range(3)) + b"tail"
    async with listening(desk) as listener, connected(listener.port) as (reader, writer):
        for start in range(0, len(stream), cut):
            writer.write(stream[start : start + cut])
            await writer.drain()
            if cut < 10:
                await asyncio.sleep(0)
        assert [await answer(reader) for _ in range(3)] == ["AA|C0", "AA|C1", "AA|C2"]
    assert [message for _, message in desk.seen] == [order(f"C{n}") for n in range(3)]


async def test_messages_of_every_size_come_whole() -> None:
    desk = Desk()
    sizes = (0, 1, 65_535, 65_536, 3 * MIB)
    async with listening(desk, max_message_bytes=4 * MIB) as listener, connected(listener.port) as (reader, writer):
        for size in sizes:
            writer.write(encode_frame(order(f"C{size}", "x" * size)))
            assert await answer(reader) == f"AA|C{size}"
    assert [message for _, message in desk.seen] == [order(f"C{size}", "x" * size) for size in sizes]


async def test_none_sends_nothing_and_the_next_message_is_still_handled() -> None:
    async def quiet(message: bytes, _: Peer) -> bytes | None:
        return None if b"QUIET" in message else accept(message)

    async with (
        MllpListener(MllpListenerConfig(port=0), quiet) as listener,
        connected(listener.port) as (reader, writer),
    ):
        writer.write(encode_frame(order("QUIET")) + encode_frame(order("C2")))
        assert await answer(reader) == "AA|C2"


async def test_half_closed_sender_still_gets_its_answers() -> None:
    desk = Desk(delay_s=0.05)
    async with listening(desk) as listener, connected(listener.port) as (reader, writer):
        writer.write(encode_frame(order("C1")) + encode_frame(order("C2")))
        writer.write_eof()
        assert [await answer(reader), await answer(reader)] == ["AA|C1", "AA|C2"]
        assert await ended(reader) == b""
        await until(lambda: listener.connections == 0)
    assert desk.problems == []


# The callback fails


@pytest.mark.parametrize("failure", [ValueError("secret^name"), OSError("secret^name"), TimeoutError("secret^name")])
async def test_failing_callback_closes_without_an_answer(failure: Exception, caplog: pytest.LogCaptureFixture) -> None:
    async def fail_on_bad(message: bytes, _: Peer) -> bytes | None:
        if b"BAD" in message:
            raise failure
        return accept(message)

    async with (
        MllpListener(MllpListenerConfig(port=0), fail_on_bad) as listener,
        connected(listener.port) as (reader, writer),
        connected(listener.port) as other,
    ):
        writer.write(encode_frame(order("BAD")) + encode_frame(order("C2")))
        assert await ended(reader) == b""
        assert await exchange(other, "C3") == "AA|C3"
    assert type(failure).__name__ in caplog.text
    assert "test_mllp_listener.py" in caplog.text
    assert "secret" not in caplog.text


async def test_answer_that_cannot_be_framed_closes_without_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(_: bytes, __: Peer) -> bytes | None:
        return b"MSH\x1c"

    async with (
        MllpListener(MllpListenerConfig(port=0), broken) as listener,
        connected(listener.port) as (reader, writer),
    ):
        writer.write(encode_frame(order("C1")))
        assert await ended(reader) == b""
    assert "FrameError" in caplog.text


async def test_failing_problem_callback_does_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(_: Peer, __: Problem) -> bytes | None:
        raise ValueError("secret")

    desk = Desk()
    config = MllpListenerConfig(port=0, max_message_bytes=1000)
    async with MllpListener(config, desk.on_message, fail) as listener:
        async with connected(listener.port) as (reader, writer):
            writer.write(b"\x0b" + b"x" * 2000)
            assert await ended(reader) == b""
        async with connected(listener.port) as other:
            assert await exchange(other, "C1") == "AA|C1"
    assert "the problem callback failed (ValueError)" in caplog.text
    assert "secret" not in caplog.text


# Who may send


async def test_only_allowed_addresses_are_heard() -> None:
    desk = Desk()
    async with listening(desk, allowed_peers=["10.0.0.0/8", "127.0.0.2"]) as listener:
        async with connected(listener.port) as (reader, writer):
            writer.write(encode_frame(order("C1")))
            assert await ended(reader) == b""
        async with connected(listener.port, local_addr=("127.0.0.2", 0)) as allowed:
            assert await exchange(allowed, "C2") == "AA|C2"
    assert desk.control_ids == ["C2"]
    assert desk.seen[0][0].address == "127.0.0.2"
    assert desk.kinds == [ProblemKind.NOT_ALLOWED]


async def test_ipv4_sender_of_a_dual_stack_listener_matches_its_ipv4_range() -> None:
    desk = Desk()
    async with listening(desk, host="::", allowed_peers=["127.0.0.0/8"]) as listener:
        async with connected(listener.port) as allowed:
            assert await exchange(allowed, "C1") == "AA|C1"
        reader, writer = await asyncio.open_connection("::1", listener.port)
        assert await ended(reader) == b""
        writer.close()
    assert desk.kinds == [ProblemKind.NOT_ALLOWED]


async def test_taken_port_is_permanent_and_named() -> None:
    desk = Desk()
    async with listening(desk) as listener:
        second = MllpListener(MllpListenerConfig(port=listener.port), desk.on_message)
        with pytest.raises(Permanent, match=f"127.0.0.1:{listener.port}"):
            await second.start()


# Stopping


async def test_stop_finishes_the_message_in_hand_and_takes_no_more() -> None:
    desk = Desk(delay_s=0.3)
    async with (
        listening(desk) as listener,
        connected(listener.port) as (reader, writer),
        connected(listener.port) as idle,
    ):
        writer.write(encode_frame(order("C1")) + encode_frame(order("C2")))
        await until(lambda: desk.at_work == 1)
        port = listener.port
        stopping = asyncio.create_task(listener.aclose())
        await asyncio.sleep(0.05)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        assert await ended(idle[0]) == b""
        assert await answer(reader) == "AA|C1"
        assert await ended(reader) == b""
        await stopping
    assert desk.control_ids == ["C1"]


async def test_stop_does_not_wait_for_ever() -> None:
    desk = Desk(delay_s=60)
    async with listening(desk, stop_timeout_s=0.3) as listener, connected(listener.port) as (reader, writer):
        writer.write(encode_frame(order("C1")))
        await until(lambda: desk.at_work == 1)
        started = time.monotonic()
        await listener.aclose()
        assert 0.2 < time.monotonic() - started < 2
        assert await ended(reader) == b""
    assert desk.at_work == 0


def test_decoder_keeps_the_head_of_what_was_too_large() -> None:
    decoder = FrameDecoder(10_000)
    with pytest.raises(ValueError, match="more than 10000"):
        decoder.feed(b"noise" + encode_frame(order("BIG", "x" * 20_000)))
    assert decoder.head == order("BIG", "x" * 20_000)[:4096]
