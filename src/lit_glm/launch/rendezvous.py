"""The rendezvous of a job's ranks, at a `torch.distributed.TCPStore` that rank 0 hosts.

Rank 0 writes the job's run folder to the store. A node that ends before all ranks have joined writes its exit status
and the reason to the store, so that the other nodes do not wait for it.
"""

import json
import os
import socket
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Dict, List, Optional

from lit_glm.config.schema import TrainConfig
from lit_glm.errors import InputError, RunError
from lit_glm.launch.nodes import Node
from lit_glm.launch.signals import INTERRUPTED_STATUSES, Interrupted

_LOOK_S = 0.05
_OTHERS_LOOK_S = 1.0
_ANNOUNCE_S = 20.0
"""Seconds for which a node that exits tries to notify the others, which may still be starting."""
_RUN, _ENDED = "run folder", "ended"


class RendezvousError(RunError):
    """Failure of the rendezvous."""


class NothingToDo(Exception):
    """Exception for a rank whose run node 0 has found to be complete."""


@dataclass
class RunFolder:
    """Run folder that node 0 chose for all nodes."""

    path: Path
    is_resume: bool


def meet(config: TrainConfig, run: Optional[RunFolder]) -> "tuple[Any, Optional[RunFolder]]":
    """Join the other ranks, as described by torchrun's environment variables.

    Args:
        config: configuration of the job.
        run: the run folder on rank 0; None on other ranks, and for a job without one.

    Returns:
        The store and the run folder.

    Raises:
        RendezvousError: if not all ranks joined in time.
        InputError, RunError, Interrupted, NothingToDo: if another node exited, according to its status.
    """
    import torch

    address, port, rank = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), int(os.environ["RANK"])
    world, limit_s = config.topology.world_size, config.run.rendezvous_timeout_s
    end = time.monotonic() + limit_s
    try:
        if rank > 0:
            _wait_for_store(address, port, end)
        store = torch.distributed.TCPStore(
            address, port, world, rank == 0, timedelta(seconds=max(1.0, limit_s)), wait_for_workers=False
        )
        if rank == 0:
            _write(store, _RUN, json.dumps(None if run is None else [str(run.path), run.is_resume]))
        _write(store, _joined(rank))
        _wait(store, [_RUN], end)
        _wait(store, [_joined(other) for other in range(world)] if rank == 0 else [_joined("all")], end)
        if rank == 0:
            _write(store, _joined("all"))
        folder = json.loads(store.get(_RUN))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:300]
        raise RendezvousError(
            f"rendezvous failed on node {os.environ['GROUP_RANK']} ({reason}): {config.topology.num_nodes} nodes were "
            f"expected at {address}:{port} (run.rendezvous_timeout_s, {limit_s:g} s). Was the same command started on "
            "every node, and can this one reach that address and port?",
            "rendezvous failed",
        ) from error
    return store, None if folder is None else RunFolder(Path(folder[0]), bool(folder[1]))


def _wait_for_store(address: str, port: int, end: float) -> None:
    """Wait until node 0 listens; torch's own wait floods the terminal.

    Raises:
        RuntimeError: on timeout.
    """
    while True:
        try:
            socket.create_connection((address, port), timeout=min(5.0, max(1.0, end - time.monotonic()))).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise RuntimeError(str(error)) from error
            time.sleep(5 * _LOOK_S)


def _joined(rank: Any) -> str:
    return f"joined {rank}"


def _write(store: Any, key: str, text: str = "") -> None:
    """Write a key of the store and a counter for it: torch 1.12 can test for a key only by a counter."""
    store.set(key, text)
    store.add(_counter(key), 1)


def _counter(key: str) -> str:
    return f"number of {key}"


def _is_there(store: Any, *keys: str) -> bool:
    return all(store.add(_counter(key), 0) > 0 for key in keys)


def _wait(store: Any, keys: List[str], end: float) -> None:
    """Wait until all keys are written; raise the error of a node that has exited.

    Raises:
        RuntimeError: on timeout, or if the store is unreachable.
    """
    while not _is_there(store, *keys):
        if _is_there(store, _ENDED):
            break
        if time.monotonic() > end:
            missing = [key for key in keys if not _is_there(store, key)]
            raise RuntimeError(f"missing: {', '.join(missing)}")
        time.sleep(_LOOK_S)
    if _is_there(store, _ENDED):
        if os.environ.get("LOCAL_RANK", "0") == "0":
            _write(store, _received(os.environ["GROUP_RANK"]))
        if os.environ["RANK"] == "0":
            time.sleep(_OTHERS_LOOK_S)  # this process hosts the store
        raise _error_of(json.loads(store.get(_ENDED)))


def _received(node: Any) -> str:
    return f"received by node {node}"


def _error_of(end: Dict[str, Any]) -> Exception:
    """Return the error of a rank for the exit of another node, with the attribute that `is_known_to_all` reads."""
    status, message = int(end["status"]), f"node {end['node']} exited before the rendezvous completed: {end['reason']}"
    error: Any = RunError(message, message)
    if status == 0:
        error = NothingToDo(message)
    elif status in INTERRUPTED_STATUSES:
        error = Interrupted(status - 128)
    elif status == InputError.exit_status:
        error = InputError(message)
    error.is_known_to_all = True
    return error


def is_known_to_all(error: BaseException) -> bool:
    """Return whether an error of `meet` needs no announcement: another node caused it, or none has joined."""
    return isinstance(error, RendezvousError) or getattr(error, "is_known_to_all", False)


def announce_end(config: TrainConfig, node: Node, status: int, reason: str) -> None:
    """Notify the other nodes that this one exits before the rendezvous; waits for them up to `_ANNOUNCE_S` seconds.

    Args:
        config: configuration of the job.
        node: this node.
        status: exit status.
        reason: reason in one sentence.
    """
    others = [other for other in range(config.topology.num_nodes) if other != node.rank]
    if config.topology.num_nodes == node.num_nodes_here:
        return
    print(
        f"lit_glm: node {node.rank} exits ({_first_line(reason)}); notifying the other nodes for up to "
        f"{_ANNOUNCE_S:g} s (Ctrl-C: exit now)",
        file=sys.stderr,
        flush=True,
    )
    import torch

    text = json.dumps({"node": node.rank, "status": status, "reason": _first_line(reason)})
    end, limit = time.monotonic() + _ANNOUNCE_S, timedelta(seconds=_ANNOUNCE_S)
    try:
        if node.rank > 0:
            _wait_for_store(node.address, node.port, end)
        store = torch.distributed.TCPStore(
            node.address, node.port, config.topology.world_size, node.rank == 0, limit, wait_for_workers=False
        )
        _write(store, _ENDED, text)
        if node.rank == 0:
            receipts = [_received(other) for other in others]
            while not _is_there(store, *receipts) and time.monotonic() < end:
                time.sleep(_LOOK_S)
            time.sleep(_OTHERS_LOOK_S)  # for the other ranks of these nodes
    except (RuntimeError, ValueError):
        return  # no other node is reachable


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else ""
