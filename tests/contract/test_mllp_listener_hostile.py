"""The MLLP listener against senders that misbehave, and against too many of them."""

import asyncio
import errno
import resource
import socket
import time
from typing import Any

import pytest

from connectors.mllp.acknowledgement import control_id_of
from connectors.mllp.framing import encode_frame
from connectors.mllp.listener import MllpListener, MllpListenerConfig, Peer, ProblemKind
from tests.mllp_senders import (
    MIB,
    Desk,
    accept,
    answer,
    connected,
    ended,
    exchange,
    listening,
    open_descriptors,
    order,
    resident_bytes,
    until,
)


async def test_oversized_message_is_answered_and_ends_its_connection_only() -> None:
    desk = Desk(problem_answer=accept(order("BIG"), "AR"))
    big = order("BIG", "x" * 5000)
    async with listening(desk, max_message_bytes=1000) as listener, connected(listener.port) as other:
        async with connected(listener.port) as (reader, writer):
            writer.write(encode_frame(order("C1")) + encode_frame(big) + encode_frame(order("C3")))
            assert [await answer(reader), await answer(reader)] == ["AA|C1", "AR|BIG"]
            assert await ended(reader) == b""
        assert await exchange(other, "C4") == "AA|C4"
    assert desk.control_ids == ["C1", "C4"]
    [(_, problem)] = desk.problems
    assert problem.kind == ProblemKind.TOO_LARGE
    assert "more than 1000 bytes" in str(problem)
    assert control_id_of(problem.head) == b"BIG"
    assert "PID" not in f"{problem} {problem!r}"


def flood(port: int, chunks: int) -> tuple[int, bytes, int]:
    """Sends an endless frame in MiB chunks. Gives the chunks sent, what came back, and the most memory in use."""
    chunk, most, sent, back = b"x" * MIB, 0, 0, b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        try:
            sock.sendall(b"\x0b")
            while sent < chunks:
                sock.sendall(chunk)
                sent += 1
                most = max(most, resident_bytes())
            sock.shutdown(socket.SHUT_WR)
            back = sock.recv(65536)
        except OSError:
            pass
    return sent, back, most


@pytest.mark.parametrize("reply", [None, accept(order("BIG"), "AR")])
async def test_endless_frame_of_200_mb_is_cut_at_the_limit_in_bounded_memory(reply: bytes | None) -> None:
    desk = Desk(problem_answer=reply)
    async with listening(desk, max_message_bytes=MIB) as listener, connected(listener.port) as other:
        # Once before measuring, so that only growth counts.
        await asyncio.to_thread(flood, listener.port, 4)
        before = resident_bytes()
        sending = asyncio.create_task(asyncio.to_thread(flood, listener.port, 200))
        answers = [await exchange(other, f"C{n}") for n in range(5)]
        sent, back, most = await sending
    assert answers == [f"AA|C{n}" for n in range(5)]
    assert most - before < 16 * MIB
    assert desk.kinds == [ProblemKind.TOO_LARGE] * 2
    if reply is None:
        assert sent < 50
    else:
        assert back == encode_frame(reply)


async def test_frame_that_never_ends_is_dropped_in_time() -> None:
    desk = Desk()
    async with listening(desk, frame_timeout_s=0.4) as listener, connected(listener.port) as (reader, writer):
        assert await exchange((reader, writer), "C1") == "AA|C1"

        async def trickle() -> None:
            writer.write(b"\x0bMSH|")
            while True:
                writer.write(b"x\x0b")
                await asyncio.sleep(0.05)

        started = time.monotonic()
        trickling = asyncio.create_task(trickle())
        assert await ended(reader) == b""
        trickling.cancel()
        assert 0.3 < time.monotonic() - started < 2
    assert desk.kinds == [ProblemKind.TOO_SLOW]
    assert "frame_timeout_s=0.4" in str(desk.problems[0][1])


async def test_time_for_a_frame_does_not_run_while_the_callback_works() -> None:
    desk = Desk(delay_s=0.5)
    second = encode_frame(order("C2"))
    async with listening(desk, frame_timeout_s=0.3) as listener, connected(listener.port) as (reader, writer):
        writer.write(encode_frame(order("C1")) + second[:20])
        assert await answer(reader) == "AA|C1"
        writer.write(second[20:])
        assert await answer(reader) == "AA|C2"


async def test_time_for_a_frame_starts_anew_with_each_frame() -> None:
    desk = Desk()
    first, second = encode_frame(order("C1")), encode_frame(order("C2"))
    async with listening(desk, frame_timeout_s=0.6) as listener, connected(listener.port) as (reader, writer):
        for piece in (first[:20], first[20:] + second[:20], second[20:]):
            writer.write(piece)
            await asyncio.sleep(0.4)
        assert [await answer(reader), await answer(reader)] == ["AA|C1", "AA|C2"]


@pytest.mark.parametrize("noise", [b"", b"MSH|no frame|\r"])
async def test_idle_connection_is_dropped_even_if_it_makes_noise(noise: bytes) -> None:
    desk = Desk()
    async with listening(desk, idle_timeout_s=0.3) as listener, connected(listener.port) as (reader, writer):

        async def murmur() -> None:
            while True:
                writer.write(noise)
                await asyncio.sleep(0.05)

        murmuring = asyncio.create_task(murmur())
        assert await ended(reader, 3) == b""
        murmuring.cancel()
        await until(lambda: listener.connections == 0)
    assert desk.kinds == [ProblemKind.IDLE]
    assert ("does the sender speak MLLP?" in str(desk.problems[0][1])) == bool(noise)


async def test_connection_with_messages_outlives_the_idle_timeout() -> None:
    desk = Desk()
    async with listening(desk, idle_timeout_s=0.4) as listener, connected(listener.port) as streams:
        for n in range(4):
            assert await exchange(streams, f"C{n}") == f"AA|C{n}"
            await asyncio.sleep(0.2)
    assert desk.problems == []


async def test_sender_that_takes_no_answers_is_dropped_and_answers_do_not_pile_up() -> None:
    desk = Desk()

    async def long_answer(message: bytes, peer: Peer) -> bytes | None:
        await desk.on_message(message, peer)
        return b"y" * MIB

    config = MllpListenerConfig(port=0, write_timeout_s=0.3)
    async with MllpListener(config, long_answer, desk.on_problem) as listener:
        with socket.create_connection(("127.0.0.1", listener.port)) as sock:
            sock.sendall(encode_frame(order("C")) * 200)
            await until(lambda: desk.problems != [])
    assert desk.kinds == [ProblemKind.ANSWER_NOT_TAKEN]
    # What the two socket buffers took, and no more.
    assert len(desk.seen) < 20


async def test_sender_that_is_gone_before_its_answer_is_noticed() -> None:
    desk = Desk(delay_s=0.3)
    async with listening(desk) as listener:
        async with connected(listener.port) as (_, writer):
            writer.write(encode_frame(order("C1")) + encode_frame(order("C2")) + encode_frame(order("C3")))
            await until(lambda: desk.at_work == 1)
        await until(lambda: listener.connections == 0)
        async with connected(listener.port) as other:
            assert await exchange(other, "C4") == "AA|C4"
    assert desk.kinds[0] is ProblemKind.ANSWER_NOT_TAKEN


async def test_connection_that_ends_inside_a_frame_is_reported() -> None:
    desk = Desk(problem_answer=accept(order("C2"), "AR"))
    async with listening(desk) as listener, connected(listener.port) as (reader, writer):
        writer.write(encode_frame(order("C1")) + encode_frame(order("C2"))[:-1])
        writer.write_eof()
        assert [await answer(reader), await answer(reader)] == ["AA|C1", "AR|C2"]
    assert desk.control_ids == ["C1"]
    assert desk.kinds == [ProblemKind.CUT_OFF]


async def test_one_connection_is_not_read_ahead_of_its_answers() -> None:
    desk = Desk()
    gate = asyncio.Event()

    async def wait(message: bytes, peer: Peer) -> bytes | None:
        await desk.on_message(message, peer)
        await gate.wait()
        return accept(message)

    async with MllpListener(MllpListenerConfig(port=0), wait) as listener, connected(listener.port) as (reader, writer):
        frame = encode_frame(order("C", "x" * MIB))
        before = resident_bytes()
        writer.write(frame * 40)
        await until(lambda: desk.at_work == 0 and len(desk.seen) == 1)
        await asyncio.sleep(0.3)
        # The sender's own copy is in this process too.
        unsent = writer.transport.get_write_buffer_size()
        assert unsent > 30 * MIB
        assert resident_bytes() - before < 40 * MIB + unsent
        gate.set()
        for _ in range(40):
            assert await answer(reader) == "AA|C"
    assert len(desk.seen) == 40


# Many at once


async def test_thousand_silent_sockets_do_not_stop_a_working_sender() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, max(soft, 4096))
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    desk, silent = Desk(), []
    try:
        async with listening(desk, max_connections=64) as listener, connected(listener.port) as working:
            assert await exchange(working, "C0") == "AA|C0"
            for n in range(1, 1001):
                sock = socket.socket()
                sock.setblocking(False)
                silent.append(sock)
                sock.connect_ex(("127.0.0.1", listener.port))
                if n % 100 == 0:
                    assert await exchange(working, f"C{n}") == f"AA|C{n}"
            await until(lambda: len(desk.problems) == 1000 + 1 - 64)
            assert listener.connections == 64
            await until(lambda: not listener._aside)
            async with connected(listener.port) as newcomer:
                assert await exchange(newcomer, "NEW") == "AA|NEW"
            assert await exchange(working, "LAST") == "AA|LAST"
    finally:
        for sock in silent:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert set(desk.kinds) == {ProblemKind.NO_ROOM}


async def test_longest_idle_goes_first_and_silent_ones_before_those_that_worked() -> None:
    desk = Desk()
    async with (
        listening(desk, max_connections=3) as listener,
        connected(listener.port) as first,
        connected(listener.port) as second,
        connected(listener.port) as silent,
    ):
        assert await exchange(first, "C1") == "AA|C1"
        assert await exchange(second, "C2") == "AA|C2"
        async with connected(listener.port) as third:
            assert await exchange(third, "C3") == "AA|C3"
            assert await ended(silent[0]) == b""
            async with connected(listener.port) as fourth:
                assert await exchange(fourth, "C4") == "AA|C4"
                assert await ended(first[0]) == b""
                assert await exchange(second, "C5") == "AA|C5"


async def test_newcomer_is_refused_while_all_are_at_work() -> None:
    desk = Desk(delay_s=0.4)
    async with listening(desk, max_connections=1) as listener, connected(listener.port) as (reader, writer):
        writer.write(encode_frame(order("C1")))
        await until(lambda: desk.at_work == 1)
        async with connected(listener.port) as refused:
            assert await ended(refused[0]) == b""
        assert await answer(reader) == "AA|C1"
    assert desk.kinds == [ProblemKind.NO_ROOM]
    assert "max_connections=1" in str(desk.problems[0][1])


async def test_half_sent_large_messages_are_held_to_an_overall_limit() -> None:
    desk = Desk()
    settings = {"max_message_bytes": 4 * MIB, "max_buffered_bytes": 10 * MIB}
    async with listening(desk, **settings) as listener:
        pairs = [await asyncio.open_connection("127.0.0.1", listener.port) for _ in range(8)]
        for n, (_, writer) in enumerate(pairs):
            writer.write(b"\x0b" + b"x" * (3 * MIB + n))
            await asyncio.sleep(0.05)
        await until(lambda: len(desk.problems) >= 5)
        assert 0 < listener._held_bytes <= 10 * MIB
        async with connected(listener.port) as small:
            assert await exchange(small, "C1") == "AA|C1"
        for _, writer in pairs:
            writer.transport.abort()
        await until(lambda: listener.connections == 0)
        assert listener._held_bytes == 0
    assert "max_buffered_bytes" in str(desk.problems[0][1])


async def test_largest_unfinished_message_goes_not_the_one_that_grows() -> None:
    desk = Desk()
    settings = {"max_message_bytes": 4 * MIB, "max_buffered_bytes": 4 * MIB}
    async with (
        listening(desk, **settings) as listener,
        connected(listener.port) as large,
        connected(listener.port) as smaller,
    ):
        large[1].write(b"\x0b" + b"x" * (3 * MIB))
        await until(lambda: listener._held_bytes >= 3 * MIB)
        smaller[1].write(encode_frame(order("C1", "x" * (2 * MIB))))
        assert await answer(smaller[0]) == "AA|C1"
        assert await ended(large[0]) == b""
    assert desk.kinds == [ProblemKind.NO_ROOM]


async def test_running_out_of_descriptors_frees_one_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk()
    loop = asyncio.get_running_loop()
    really_accept, failures = loop.sock_accept, [errno.EMFILE, errno.ECONNABORTED]

    async def sometimes(sock: socket.socket) -> Any:
        if failures and desk.seen:
            raise OSError(failures.pop(0), "made to fail")
        return await really_accept(sock)

    async with listening(desk) as listener:
        monkeypatch.setattr(loop, "sock_accept", sometimes)
        async with connected(listener.port) as first, connected(listener.port) as idle:
            await until(lambda: listener.connections == 2)
            assert await exchange(first, "C1") == "AA|C1"
            async with connected(listener.port) as second:
                assert await exchange(second, "C2") == "AA|C2"
            async with connected(listener.port) as third:
                assert await exchange(third, "C3") == "AA|C3"
            assert await ended(idle[0]) == b""
            assert await exchange(first, "C4") == "AA|C4"
    assert failures == []
    assert desk.kinds == [ProblemKind.NO_ROOM]


async def test_no_descriptor_is_left_behind() -> None:
    desk = Desk()
    before = open_descriptors()
    async with listening(desk, max_connections=5, max_message_bytes=1000) as listener:
        for n in range(30):
            _, writer = await asyncio.open_connection("127.0.0.1", listener.port)
            writer.write((b"", encode_frame(order("C")), b"\x0b" + b"x" * 3000)[n % 3])
            await asyncio.sleep(0.01)
            if n % 2:
                writer.transport.abort()
            else:
                writer.close()
        await until(lambda: listener.connections == 0)
    await until(lambda: open_descriptors() <= before)
