"""Listens for HL7 v2 messages over MLLP: many senders at once, the messages of each in order, answers from a callback.

Knows nothing of what a message says or where it is kept. No peer can stop it: see README.md for what ends a connection.
"""

import asyncio
import contextlib
import dataclasses
import errno
import ipaddress
import itertools
import logging
import socket
from types import TracebackType
from typing import Any, Self

from connectors.errors import Permanent
from connectors.mllp.framing import encode_frame
from connectors.mllp.inbound import (
    PIECE_BYTES,
    Activity,
    Dropped,
    InboundConnection,
    OnMessage,
    OnProblem,
    Peer,
    Problem,
    ProblemKind,
)
from connectors.mllp.listener_config import MllpListenerConfig
from connectors.mllp.listener_tls import listener_tls_context, names_of, subject_of

__all__ = ["MllpListener", "MllpListenerConfig", "OnMessage", "OnProblem", "Peer", "Problem", "ProblemKind"]

_BACKLOG = 1024
_ACCEPTED_A_TURN = 16
_ACCEPT_PAUSE_S = 0.1
_TLS_SHUTDOWN_S = 1.0
# What ends by itself every day, beside what somebody should look at.
_ORDINARY = (ProblemKind.IDLE, ProblemKind.NO_ROOM)

_log = logging.getLogger(__name__)


class MllpListener:
    """Listens while its `async with` block runs.

    `on_message(message, peer)` is awaited for every whole message; what it returns is sent back as a frame, None sends
    nothing. It must return only once the message is safe. Whatever it raises closes the connection without an answer.
    `on_problem(peer, problem)` is told why the listener ended a connection; what it returns is sent before the close
    where the peer can still read.
    """

    def __init__(self, config: MllpListenerConfig, on_message: OnMessage, on_problem: OnProblem | None = None) -> None:
        self._config = config
        self._on_message = on_message
        self._on_problem = on_problem
        self._tls = listener_tls_context(config)
        self._socket: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._tasks: dict[Activity, asyncio.Task[None]] = {}
        # Evicted connections on their way out, and reports that nobody waits for.
        self._aside: set[asyncio.Task[Any]] = set()
        self._held_bytes = 0

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def port(self) -> int:
        """The TCP port in use. Raises RuntimeError before the start."""
        if self._socket is None:
            raise RuntimeError(f"{self._config.name} has not been started")
        return int(self._socket.getsockname()[1])

    @property
    def connections(self) -> int:
        """Connections open now."""
        return len(self._tasks)

    async def start(self) -> None:
        """Takes connections from here on. Raises Permanent if the address cannot be listened on."""
        config, six = self._config, ":" in self._config.host
        family = socket.AF_INET6 if six else socket.AF_INET
        both = config.host == "::" and socket.has_dualstack_ipv6()
        try:
            self._socket = socket.create_server(
                (config.host, config.port), family=family, backlog=_BACKLOG, dualstack_ipv6=both
            )
        except OSError as error:
            reason = error.strerror or type(error).__name__
            where = f"{config.name}: cannot listen on {config.host}:{config.port}"
            raise Permanent(f"{where} ({reason}). Check host, and whether another program has the port.") from error
        self._socket.setblocking(False)
        # Accepted sockets inherit it; it finds senders that vanished.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._accepting = asyncio.create_task(self._accept(self._socket))

    async def aclose(self) -> None:
        """Takes no more connections, lets messages in hand and their answers finish (`stop_timeout_s`), closes all."""
        if self._accepting:
            self._accepting.cancel()
            await asyncio.wait([self._accepting])
        if self._socket:
            self._socket.close()
        for activity, task in list(self._tasks.items()):
            activity.leaving = True
            if not activity.busy:
                task.cancel()
        await self._finish([*self._tasks.values(), *self._aside])

    async def _finish(self, tasks: list[asyncio.Task[Any]]) -> None:
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=self._config.stop_timeout_s)
        for task in late:
            task.cancel()
        if late:
            _log.warning("%s: %d messages in hand were not finished in time", self._config.name, len(late))
            await asyncio.wait(late, timeout=self._config.stop_timeout_s)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for accepted in itertools.count(1):
            try:
                sock, address = await loop.sock_accept(listening)
            except OSError as error:
                await self._not_accepted(error)
                continue
            self._admit(sock, Peer(str(address[0]), int(address[1])))
            if accepted % _ACCEPTED_A_TURN == 0:
                # sock_accept returns at once while connections wait: the open ones must get their turn.
                await asyncio.sleep(0)

    async def _not_accepted(self, error: OSError) -> None:
        """The peer was gone at once, or the process is out of file descriptors: one is freed, the listener goes on."""
        _log.warning("%s: a connection was not accepted (%s)", self._config.name, error.strerror)
        if error.errno in (errno.EMFILE, errno.ENFILE):
            self._make_way()
            await asyncio.sleep(_ACCEPT_PAUSE_S)

    def _admit(self, sock: socket.socket, peer: Peer) -> None:
        problem = None
        if not self._is_allowed(peer):
            problem = Problem(ProblemKind.NOT_ALLOWED, "the address is not in allowed_peers")
        elif len(self._tasks) >= self._config.max_connections and not self._make_way():
            problem = Problem(ProblemKind.NO_ROOM, f"all max_connections={self._config.max_connections} are at work")
        if problem:
            sock.close()
            self._report_aside(peer, problem)
            return
        activity = Activity(peer, asyncio.get_running_loop().time())
        task = asyncio.create_task(self._serve(sock, activity))
        self._tasks[activity] = task
        task.add_done_callback(lambda _: self._forget(activity, sock))

    def _is_allowed(self, peer: Peer) -> bool:
        address = ipaddress.ip_address(peer.address)
        # A dual-stack socket shows IPv4 peers as ::ffff:a.b.c.d.
        address = getattr(address, "ipv4_mapped", None) or address
        networks = self._config.allowed_peers
        return not networks or any(address in network for network in networks)

    def _forget(self, activity: Activity, sock: socket.socket | None = None) -> None:
        self._tasks.pop(activity, None)
        self._held_bytes -= activity.held_bytes
        activity.held_bytes = 0
        if sock:
            sock.close()

    def _make_way(self) -> bool:
        """Evicts the longest idle connection, those that never sent a message first; False if all are at work."""
        idle = [activity for activity in self._tasks if not activity.busy]
        if not idle:
            return False
        reason = f"idle the longest while another came (max_connections={self._config.max_connections})"
        self._evict(min(idle, key=lambda one: (one.served, one.quiet_since)), reason)
        return True

    def _evict(self, activity: Activity, reason: str) -> None:
        task = self._tasks[activity]
        self._forget(activity)
        task.cancel()
        self._keep_aside(task)
        self._report_aside(activity.peer, Problem(ProblemKind.NO_ROOM, reason))

    def _hold(self, activity: Activity, held_bytes: int) -> None:
        """Accounts for the memory of a connection. Beyond `max_buffered_bytes` the largest unfinished message goes,
        so that no number of half-sent large messages keeps a small one out."""
        growth = held_bytes - activity.held_bytes
        self._held_bytes += growth
        activity.held_bytes = held_bytes
        if growth <= 0 or self._held_bytes <= self._config.max_buffered_bytes:
            return
        waiting = [one for one in self._tasks if not one.busy]
        largest = max(waiting, key=lambda one: one.held_bytes, default=activity)
        reason = f"the largest unfinished message at max_buffered_bytes={self._config.max_buffered_bytes}"
        if largest is activity:
            raise Dropped(Problem(ProblemKind.NO_ROOM, reason))
        self._evict(largest, reason)

    async def _serve(self, sock: socket.socket, activity: Activity) -> None:
        """One connection from its handshake to its close."""
        connection, answered = None, False
        try:
            connection = await self._open(sock, activity)
            problem = await connection.converse()
            answered = await self._take_leave(connection, activity, problem) if problem else activity.leaving
        except Dropped as dropped:
            await self._report(activity.peer, dropped.problem)
        finally:
            if connection and activity not in self._tasks:
                connection.abort()
            elif connection:
                await connection.close(after_answer=answered)

    async def _open(self, sock: socket.socket, activity: Activity) -> InboundConnection:
        """The connection after the TLS handshake and the look at its certificate. Raises Dropped."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=PIECE_BYTES, loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        limits: dict[str, float] = {}
        if self._tls:
            limits["ssl_handshake_timeout"] = self._config.tls_handshake_timeout_s
            limits["ssl_shutdown_timeout"] = _TLS_SHUTDOWN_S
        try:
            transport, _ = await loop.connect_accepted_socket(lambda: protocol, sock, ssl=self._tls, **limits)
        except OSError as error:
            reason = getattr(error, "reason", None) or type(error).__name__
            raise Dropped(Problem(ProblemKind.NO_TLS, f"no TLS connection ({reason})")) from error
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        connection = InboundConnection(self._config, activity, (reader, writer), self._on_message, self._hold)
        try:
            self._identify(activity, transport)
        except Dropped:
            connection.abort()
            raise
        return connection

    def _identify(self, activity: Activity, transport: asyncio.BaseTransport) -> None:
        certificate = transport.get_extra_info("peercert")
        if not certificate:
            return
        activity.peer = dataclasses.replace(activity.peer, certificate_subject=subject_of(certificate))
        allowed = {name.casefold() for name in self._config.allowed_subjects}
        if allowed and not allowed & names_of(certificate):
            raise Dropped(Problem(ProblemKind.NOT_ALLOWED, "the certificate is not in allowed_subjects"))

    async def _take_leave(self, connection: InboundConnection, activity: Activity, problem: Problem) -> bool:
        """Tells of the problem, and the peer if there is an answer to it. Whether one was sent."""
        activity.busy = True
        answer = await self._report(activity.peer, problem)
        if answer is None or problem.kind is ProblemKind.ANSWER_NOT_TAKEN:
            return False
        with contextlib.suppress(Dropped):
            await connection.write(answer)
            return True
        return False

    def _report_aside(self, peer: Peer, problem: Problem) -> None:
        """Reports without keeping anybody waiting. A flood is only logged."""
        if len(self._aside) >= 2 * self._config.max_connections:
            _log.warning("%s: %s: %s", self._config.name, peer, problem)
            return
        self._keep_aside(asyncio.create_task(self._report(peer, problem)))

    def _keep_aside(self, task: asyncio.Task[Any]) -> None:
        self._aside.add(task)
        task.add_done_callback(self._aside.discard)

    async def _report(self, peer: Peer, problem: Problem) -> bytes | None:
        """Logs a problem and gives the framed answer to it, None if there is none."""
        level = logging.INFO if problem.kind in _ORDINARY else logging.WARNING
        _log.log(level, "%s: %s: %s", self._config.name, peer, problem)
        if self._on_problem is None:
            return None
        try:
            answer = await self._on_problem(peer, problem)
            return None if answer is None else encode_frame(answer)
        except Exception as error:
            _log.error("%s: the problem callback failed (%s)", self._config.name, type(error).__name__)
            return None
