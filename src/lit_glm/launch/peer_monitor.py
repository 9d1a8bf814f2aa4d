"""Cross-node liveness: if one rank exits, every rank on every node exits within seconds.

A supervisor or torchrun watches its own node only, and a collective library may wait for a lost peer until its own
timeout, half an hour with some. Therefore each rank holds a TCP connection to rank 0. The kernel closes the connections
of a process however it exits, and detects a host that no longer answers.
"""

import logging
import os
import secrets
import selectors
import socket
import struct
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, Optional, Sequence, Tuple

from lit_glm.errors import RunError
from lit_glm.launch.signals import INTERRUPTED_STATUSES, Interrupted

_GRACE_S = 10.0
"""Seconds to wait for a collective's error or torchrun's signal, which shut a rank down more cleanly."""
_CONNECT_S = 30.0
_HELLO_S = 5.0
_EXIT_MESSAGE_TIMEOUT_S = 2.0
log = logging.getLogger(__name__)
_PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # detects a lost host after 30 s
_HELLO = struct.Struct("!16si")
_EXIT_MESSAGE = struct.Struct("!ii")  # a rank and its exit status
_TOKEN_BYTES = 16
_NO_MESSAGE = -1
_FRAMES = 8


def _exit_with_stack(message: str, status: int) -> None:
    main = sys._current_frames().get(threading.main_thread().ident or 0)
    calls = "".join(traceback.format_stack(main)[-_FRAMES:])
    log.error(f"{message}; its stack:\n{calls.rstrip()}")
    os._exit(status)


class PeerMonitor:
    """Connections of this rank to its peers. A thread waits on them; nothing is sent until a rank exits."""

    def __init__(self, rank: int, peers: Dict[int, socket.socket], hosts: Sequence[str]) -> None:
        """Start the monitor thread.

        Args:
            rank: this rank.
            peers: connections by rank: all others on rank 0, only rank 0 elsewhere.
            hosts: host names of all ranks.
        """
        self._rank, self._peers, self._hosts = rank, peers, hosts
        self._closed, self._lost = threading.Event(), threading.Event()
        self._lost_rank, self._status = -1, 0
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, name="peer monitor", daemon=True).start()

    def announce_exit(self, status: int) -> None:
        """Send this rank's exit status to its peers; they exit too unless it is 0."""
        self._closed.set()
        self._send_exit(self._rank, status)

    def error_of_lost_peer(self) -> Optional[BaseException]:
        """Return the error that names the lost peer behind an error of this rank; waits for the peer's message."""
        if not self._lost.wait(_EXIT_MESSAGE_TIMEOUT_S):
            return None
        if self._status in INTERRUPTED_STATUSES:
            return Interrupted(self._status - 128)
        return RunError(self._describe_loss())

    def _describe_loss(self) -> str:
        peer = f"rank {self._lost_rank} on {self._hosts[self._lost_rank]}"
        if self._status in INTERRUPTED_STATUSES:
            return f"{peer} was interrupted"
        return f"lost {peer}: killed or unreachable" if self._status == _NO_MESSAGE else f"{peer} failed"

    def _send_exit(self, rank: int, status: int) -> None:
        with self._lock:
            for connection in self._peers.values():
                try:
                    connection.sendall(_EXIT_MESSAGE.pack(rank, status))
                except OSError:
                    pass  # this peer has exited

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._peers.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    lost, status = self._receive_exit(key.fileobj, key.data)
                    if status:
                        self._on_peer_exit(lost, status)
                        return
                    selector.unregister(key.fileobj)

    def _receive_exit(self, connection: Any, rank: int) -> Tuple[int, int]:
        """Return which rank exited and its status; `_NO_MESSAGE` if the connection closed without a message."""
        try:
            data = connection.recv(_EXIT_MESSAGE.size, socket.MSG_WAITALL)
        except OSError:
            data = b""
        return _EXIT_MESSAGE.unpack(data) if len(data) == _EXIT_MESSAGE.size else (rank, _NO_MESSAGE)

    def _on_peer_exit(self, lost: int, status: int) -> None:
        self._lost_rank, self._status = lost, status
        self._lost.set()
        if self._closed.is_set():
            return
        if self._rank == 0:
            self._send_exit(lost, status)
        time.sleep(_GRACE_S)
        if not self._closed.is_set():
            message = f"rank {self._rank} exits: {self._describe_loss()}"
            _exit_with_stack(message, status if status in INTERRUPTED_STATUSES else 1)


@contextmanager
def name_lost_peer(monitor: Optional[PeerMonitor]) -> Iterator[None]:
    """Replace an error caused by the exit of another rank by one that names it; None: no rank is monitored.

    Raises:
        RunError, Interrupted: instead of the collective library's error.
    """
    try:
        yield
    except BaseException as error:
        lost_peer = None if monitor is None or hasattr(error, "exit_status") else monitor.error_of_lost_peer()
        if lost_peer is None:
            raise
        raise lost_peer from error


def _listener() -> socket.socket:
    """Open a listening socket for IPv4 and IPv6, or for IPv4 only if IPv6 is unavailable."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError:
            pass  # IPv6 is disabled
    return socket.create_server(("", 0))


def _enable_keepalive(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _PROBES.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def _accept_peers(listener: socket.socket, token: bytes, count: int) -> Dict[int, socket.socket]:
    """Accept the connections of all other ranks; a connection without the token is closed."""
    peers: Dict[int, socket.socket] = {}
    limit = time.monotonic() + _CONNECT_S
    while len(peers) < count:
        listener.settimeout(max(0.1, limit - time.monotonic()))
        try:
            connection, _ = listener.accept()
        except socket.timeout:
            raise RunError(
                f"only {len(peers)} of {count} ranks have reached port {listener.getsockname()[1]} of rank 0 in "
                f"{_CONNECT_S:g} s: nodes must reach each other on any port"
            ) from None
        try:
            connection.settimeout(_HELLO_S)
            theirs, rank = _HELLO.unpack(connection.recv(_HELLO.size))  # sent in one piece
        except (OSError, struct.error):
            connection.close()
            continue
        if secrets.compare_digest(theirs, token):
            peers[rank] = _enable_keepalive(connection)
        else:
            connection.close()
    return peers


def connect_peers(rank: int, hosts: Sequence[str], address: str, broadcast: Callable[[Any], Any]) -> PeerMonitor:
    """Connect this rank with rank 0; called by all ranks.

    Args:
        rank: this rank.
        hosts: host names of all ranks, for messages.
        address: address of rank 0 as seen by the other ranks.
        broadcast: broadcasts rank 0's argument to all ranks.

    Raises:
        RunError: if the ranks cannot reach each other.
    """
    if rank == 0:
        with _listener() as listener:
            token = secrets.token_bytes(_TOKEN_BYTES)
            broadcast((listener.getsockname()[1], token.hex()))
            return PeerMonitor(0, _accept_peers(listener, token, len(hosts) - 1), hosts)
    port, token = broadcast(None)
    try:
        connection = socket.create_connection((address, port), timeout=_CONNECT_S / 3)  # per address of the host
        connection.sendall(_HELLO.pack(bytes.fromhex(token), rank))
    except OSError as error:
        raise RunError(
            f"rank {rank} cannot reach rank 0 at {address}:{port} ({error}): nodes must reach each other on any port"
        ) from error
    return PeerMonitor(rank, {0: _enable_keepalive(connection)}, hosts)
