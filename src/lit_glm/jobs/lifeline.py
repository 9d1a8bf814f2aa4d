"""Ties the ranks of several nodes together: one that ends without a word, wherever, ends all within seconds.

torchrun's agents watch their own node only, and a collective library may wait for a peer on another one as long as its
own limit lets it, half an hour with some. So each rank holds a connection to rank 0. The kernel closes those of a
process that is gone, however it ended, and notices when a host no longer answers.
"""

import os
import secrets
import selectors
import socket
import struct
import sys
import threading
import time
from typing import Any, Callable, Dict, Optional

from lit_glm.errors import RunError

_GRACE_S = 10.0
"""For the error of a collective, or torchrun's signal: they end a rank in better order than this does."""
_CONNECT_S = 30.0
_HELLO_S = 5.0
_PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # a host that is gone is noticed after 30 s
_HELLO = struct.Struct("!16si")
_WORD = struct.Struct("!i")
_DONE = -1
_TOKEN_BYTES = 16


def _end(words: str) -> None:
    print(f"lit_glm: {words}", file=sys.stderr, flush=True)
    os._exit(1)


class Lifeline:
    """This rank's end of it. A thread waits; nothing is sent until somebody ends."""

    def __init__(self, rank: int, peers: Dict[int, socket.socket], end: Callable[[str], None] = _end) -> None:
        """Begin to watch.

        Args:
            rank: this one.
            peers: connections by rank: all others on rank 0, rank 0 alone elsewhere.
            end: called some seconds after a rank was lost, with what to say.
        """
        self._rank, self._peers, self._end = rank, peers, end
        self._addresses = {rank: connection.getpeername()[0] for rank, connection in peers.items()}
        self._over = threading.Event()
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def let_go(self, failed: bool) -> None:
        """Tell the others that this rank ends, and whether they must too."""
        self._over.set()
        self._tell(self._rank if failed else _DONE)

    def _tell(self, word: int) -> None:
        with self._lock:
            for connection in self._peers.values():
                try:
                    connection.sendall(_WORD.pack(word))
                except OSError:
                    pass  # gone by itself

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._peers.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    lost = self._heard(key.fileobj, key.data)
                    if lost is not None:
                        self._mourn(lost)
                        return
                    selector.unregister(key.fileobj)

    def _heard(self, connection: Any, rank: int) -> Optional[int]:
        """Which rank is lost, if any: that of the connection if it ended without a word."""
        try:
            said = connection.recv(_WORD.size, socket.MSG_WAITALL)
        except OSError:
            said = b""
        word: int = _WORD.unpack(said)[0] if len(said) == _WORD.size else rank
        return None if word == _DONE else word

    def _mourn(self, lost: int) -> None:
        if self._over.is_set():
            return
        if self._rank == 0:
            self._tell(lost)
        where = f" on {self._addresses[lost]}" if lost in self._addresses else ""
        time.sleep(_GRACE_S)
        if not self._over.is_set():
            self._end(f"rank {self._rank} ends because rank {lost}{where} failed, was killed or is out of reach")


def _probed(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _PROBES.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def _welcome(listener: socket.socket, token: bytes, others: int) -> Dict[int, socket.socket]:
    """Connections of all other ranks; whoever does not know the token is sent away."""
    peers: Dict[int, socket.socket] = {}
    limit = time.monotonic() + _CONNECT_S
    while len(peers) < others:
        listener.settimeout(max(0.1, limit - time.monotonic()))
        try:
            connection, _ = listener.accept()
        except socket.timeout:
            raise RunError(
                f"only {len(peers)} of {others} ranks have reached port {listener.getsockname()[1]} of rank 0 in "
                f"{_CONNECT_S:g} s: nodes must reach each other on any port"
            ) from None
        try:
            connection.settimeout(_HELLO_S)
            theirs, rank = _HELLO.unpack(connection.recv(_HELLO.size))  # sent as one
        except (OSError, struct.error):
            connection.close()
            continue
        if secrets.compare_digest(theirs, token):
            peers[rank] = _probed(connection)
        else:
            connection.close()
    return peers


def tie(rank: int, world_size: int, address: str, agree: Callable[[Any], Any]) -> Lifeline:
    """Connect this rank with rank 0; called by all ranks.

    Args:
        rank: this one.
        world_size: how many there are.
        address: of rank 0, as the other ranks see it.
        agree: gives all ranks what rank 0 has given it.

    Raises:
        RunError: if they cannot reach each other.
    """
    if rank == 0:
        with socket.create_server(("", 0)) as listener:
            token = secrets.token_bytes(_TOKEN_BYTES)
            agree((listener.getsockname()[1], token))
            return Lifeline(0, _welcome(listener, token, world_size - 1))
    port, token = agree(None)
    try:
        connection = socket.create_connection((address, port), timeout=_CONNECT_S)
        connection.sendall(_HELLO.pack(token, rank))
    except OSError as error:
        raise RunError(
            f"rank {rank} cannot reach rank 0 at {address}:{port} ({error}): nodes must reach each other on any port"
        ) from error
    return Lifeline(rank, {0: _probed(connection)})
