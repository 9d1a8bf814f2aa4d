"""Nodes of a job and the rendezvous of its ranks, at a `torch.distributed.TCPStore` that rank 0 hosts.

Node, address and port come from the launcher's variables (torchrun, Slurm, ours); no torch is imported for that.

Rank 0 writes the job's run folder to the store. A node that ends before all ranks have joined writes its exit status
and the reason to the store, so that the other nodes do not wait for it.
"""

import errno
import ipaddress
import json
import logging
import os
import socket
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import psutil

from lit_glm.config.schema import TopologyConfig, TrainConfig
from lit_glm.errors import InputError, RunError, first_line
from lit_glm.launch.signals import INTERRUPTED_STATUSES, Interrupted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Node:
    """Rank and rendezvous address of this node."""

    rank: int
    address: str
    """Address of node 0."""
    port: int
    """Port on which node 0 waits for the others; 0: the ranks of one machine get a free one when they start."""
    num_nodes_here: int = 1
    """Number of nodes simulated on this machine (simulated runtime without MASTER_ADDR)."""


def resolve_node(topology: TopologyConfig, simulated: bool = False) -> Node:
    """Find this node's rank and address; several nodes need MASTER_ADDR, MASTER_PORT and NODE_RANK in the environment.

    Args:
        topology: number of nodes and devices.
        simulated: whether devices are simulated, in which case one machine can run the ranks of all nodes.

    Raises:
        InputError: if a variable is missing or does not fit the topology, or if the port is in use.
    """
    check_node_count(topology)
    if topology.num_nodes == 1:
        if topology.world_size == 1 or not os.environ.get("MASTER_PORT"):
            return Node(0, "127.0.0.1", 0)
        node = Node(0, "127.0.0.1", _int_from_env("MASTER_PORT", 65535))
        check_port(node.port)
        return node
    if simulated and not any(os.environ.get(name) for name in ("MASTER_ADDR", "NODE_RANK", "SLURM_JOB_ID")):
        return Node(0, "127.0.0.1", 0, topology.num_nodes)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"topology={topology.name} has {topology.num_nodes} nodes: run the same command on each node with "
            f"MASTER_ADDR, MASTER_PORT and NODE_RANK set (missing here: {', '.join(missing)}), "
            "or use scripts/launch_node.sh or scripts/launch_slurm.sh"
        )
    node = Node(
        _int_from_env("NODE_RANK", topology.num_nodes - 1),
        os.environ["MASTER_ADDR"],
        _int_from_env("MASTER_PORT", 65535),
    )
    try:
        socket.getaddrinfo(node.address, node.port)
    except OSError as error:
        raise InputError(
            f"MASTER_ADDR={node.address}: this host name cannot be resolved on {socket.gethostname()} "
            f"({error.strerror}); give the address of node 0 instead"
        ) from error
    if node.rank == 0:
        check_port(node.port)
    return node


def check_node_count(topology: TopologyConfig) -> None:
    """Compare the number of nodes that Slurm or NODE_RANK reports with the topology.

    Raises:
        InputError: if they differ.
    """
    nodes = topology.num_nodes
    expected = f"topology={topology.name} has {nodes} node{'s' * (nodes > 1)}"
    started_nodes, started_tasks = (os.environ.get(f"SLURM_STEP_NUM_{unit}", "") for unit in ("NODES", "TASKS"))
    inside = (
        "this process runs in a step of srun (SLURM_STEP_NUM_NODES, SLURM_STEP_NUM_TASKS); start an interactive shell "
        "with `srun --nodes=1 --ntasks=1 --pty bash`, or unset these variables"
    )
    if started_nodes.isdigit() and int(started_nodes) != nodes:  # an empty value carries no information
        raise InputError(f"{expected}, but Slurm started {started_nodes}: {inside}")
    if started_tasks.isdigit() and int(started_tasks) != nodes:
        raise InputError(
            f"{expected}, but Slurm started {started_tasks} tasks: use one task per node, train starts the ranks; "
            f"{inside}"
        )
    if nodes == 1 and os.environ.get("NODE_RANK", "0") not in ("", "0"):
        raise InputError(
            f"{expected}, but NODE_RANK={os.environ['NODE_RANK']}: unset it, or choose the topology of all nodes"
        )


def _int_from_env(name: str, highest: int) -> int:
    text = os.environ[name]
    lowest = int(name == "MASTER_PORT")
    if not text.isdigit() or not lowest <= int(text) <= highest:
        raise InputError(f"{name}={text}: must be a number from {lowest} to {highest}")
    return int(text)


def check_port(port: int) -> None:
    """Check that a port is free, so that a busy port is an immediate error.

    Raises:
        InputError: if this machine cannot listen on it.
    """
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            probe.listen(1)
    except OSError as error:
        reason = "is in use on this machine" if error.errno == errno.EADDRINUSE else f"cannot be used ({error})"
        raise InputError(f"MASTER_PORT={port}: {reason}; choose another, the same on every node") from error


def free_port() -> int:
    """Return a port that no process of this machine uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


_REMOTE_ADDRESS = "192.0.2.1"
"""Address that no machine has (RFC 5737, for documentation): the route to it is the default route."""


def network_interface_to(address: str) -> Optional[str]:
    """Return the network interface by which this machine exchanges data with node 0 and the other nodes.

    Many hosts resolve their own name to 127.0.1.1, where other nodes cannot reach them. On node 0, such a name gives
    the interface of the default route.

    Args:
        address: host name or address of node 0. "localhost" and loopback addresses give the loopback interface.

    Returns:
        The name of the interface; None if unknown.
    """
    source = _source_address_to(address)
    if source is not None and source.startswith("127.") and not _is_loopback(address):
        source = _source_address_to(_REMOTE_ADDRESS)
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.family == socket.AF_INET and entry.address == source for entry in entries):
            return str(name)
    return None


def _source_address_to(address: str) -> Optional[str]:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing, only selects the route
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def is_external_rank(topology: TopologyConfig) -> bool:
    """Return whether this process is a rank of a torchrun that the user has started.

    Raises:
        InputError: if the number of ranks differs from the topology.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or "LOCAL_RANK" not in os.environ:
        return False
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if world != topology.world_size or local not in (0, topology.devices_per_node):
        raise InputError(
            f"topology={topology.name} has {topology.world_size} ranks, {topology.devices_per_node} per node, "
            f"but torchrun started {world}, {local} per node; they must be equal"
        )
    return True


_POLL_S = 0.05
_PEER_POLL_S = 1.0
_ANNOUNCE_S = 20.0
"""Seconds for which a node that exits tries to notify the others, which may still be starting."""
_RUN, _ENDED, _BROADCAST = "run folder", "ended", "broadcast"


class RendezvousError(RunError):
    """Failure of the rendezvous."""


class NothingToDo(Exception):
    """Exception for a rank whose run node 0 has found to be complete."""

    exit_status = 0


@dataclass
class RunFolder:
    """Run folder that node 0 chose for all nodes."""

    path: Path
    is_resume: bool
    is_complete: bool = False


def join_rendezvous(
    config: TrainConfig, run: Optional[RunFolder], external: bool = False
) -> "tuple[Any, Optional[RunFolder], List[str]]":
    """Join the other ranks, as described by torchrun's environment variables.

    Args:
        config: configuration of the job.
        run: the run folder on rank 0; None on other ranks, and for a job without one.
        external: whether the user's torchrun started the ranks, whose agent hosts the store.

    Returns:
        The store, the run folder, and the host names of all ranks.

    Raises:
        RendezvousError: if not all ranks joined in time.
        InputError, RunError, Interrupted, NothingToDo: if another node exited, according to its status.
    """
    import torch
    from torch.distributed.rendezvous import rendezvous

    address, port, rank = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), int(os.environ["RANK"])
    world, limit_s = config.topology.world_size, config.run.rendezvous_timeout_s
    deadline = time.monotonic() + limit_s
    try:
        if rank > 0:
            log.debug(f"rank {rank} connects to {address}:{port}")
            _wait_for_store(address, port, deadline)
        limit = timedelta(seconds=max(1.0, limit_s))
        if external:
            store, _, _ = next(rendezvous("env://", timeout=limit))
        else:
            store = torch.distributed.TCPStore(address, port, world, rank == 0, limit, wait_for_workers=False)
        if rank == 0:
            log.debug(f"rank 0 listens on port {port}")
            _write(store, _RUN, json.dumps(None if run is None else [str(run.path), run.is_resume]))
        _write(store, _joined_key(rank), socket.gethostname())
        with _announce_stop(store):
            _wait(
                store, [_joined_key(other) for other in range(world)] if rank == 0 else [_joined_key("all")], deadline
            )
        if rank == 0:
            _write(
                store, _joined_key("all"), json.dumps([store.get(_joined_key(one)).decode() for one in range(world)])
            )
        hosts, folder = json.loads(store.get(_joined_key("all"))), json.loads(store.get(_RUN))
    except (RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise RendezvousError(
            f"rendezvous failed on node {os.environ['GROUP_RANK']} ({reason}): {config.topology.num_nodes} nodes were "
            f"expected at {address}:{port} (run.rendezvous_timeout_s, {limit_s:g} s). Was the same command started on "
            "every node, and can this one reach that address and port?",
            "rendezvous failed",
        ) from error
    return store, None if folder is None else RunFolder(Path(folder[0]), bool(folder[1])), hosts


@contextmanager
def _announce_stop(store: Any) -> Iterator[None]:
    """Notify the ranks that have joined if a signal stops rank 0, whose store ends with it; re-raise the exception."""
    try:
        yield
    except Interrupted as stop:
        if os.environ["RANK"] == "0" and not is_known_to_all(stop):
            with suppress(RuntimeError, ValueError):  # the store of a torchrun that was killed
                _write(store, _ENDED, json.dumps({"node": 0, "status": stop.exit_status, "reason": str(stop)}))
                time.sleep(_PEER_POLL_S)
        raise


def broadcast_through_store(store: Any, content: Any) -> Any:
    """Return rank 0's content, which JSON can represent, on all ranks that have met; called once per job.

    Raises:
        RunError: if rank 0 has exited.
    """
    try:
        if os.environ["RANK"] == "0":
            _write(store, _BROADCAST, json.dumps(content))
        return json.loads(store.get(_BROADCAST))
    except (RuntimeError, ValueError) as error:
        raise RunError(f"rank 0 exited right after the rendezvous ({first_line(error)})") from error


def _wait_for_store(address: str, port: int, deadline: float) -> None:
    """Wait until node 0 listens; torch's own wait floods the terminal.

    Raises:
        RuntimeError: on timeout.
    """
    while True:
        try:
            socket.create_connection((address, port), timeout=min(5.0, max(1.0, deadline - time.monotonic()))).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(str(error)) from error
            time.sleep(5 * _POLL_S)


def _joined_key(rank: Any) -> str:
    return f"joined {rank}"


def _write(store: Any, key: str, text: str = "") -> None:
    """Write a key of the store and a counter for it: torch 1.12 can test for a key only by a counter."""
    store.set(key, text)
    store.add(_counter(key), 1)


def _counter(key: str) -> str:
    return f"number of {key}"


def _is_set(store: Any, *keys: str) -> bool:
    return all(store.add(_counter(key), 0) > 0 for key in keys)


def _wait(store: Any, keys: List[str], deadline: float) -> None:
    """Wait until all keys are written; raise the error of a node that has exited.

    Raises:
        RuntimeError: on timeout, or if the store is unreachable.
    """
    while not _is_set(store, *keys):
        if _is_set(store, _ENDED):
            break
        if time.monotonic() > deadline:
            missing = [key for key in keys if not _is_set(store, key)]
            raise RuntimeError(f"missing: {', '.join(missing)}")
        time.sleep(_POLL_S)
    if _is_set(store, _ENDED):
        if os.environ.get("LOCAL_RANK", "0") == "0":
            _write(store, _receipt_key(os.environ["GROUP_RANK"]))
        if os.environ["RANK"] == "0":
            time.sleep(_PEER_POLL_S)  # this process hosts the store
        raise _error_of(json.loads(store.get(_ENDED)))


def _receipt_key(node: Any) -> str:
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
    """Return whether an error of `join_rendezvous` needs no announcement: another node caused it, or none joined."""
    return isinstance(error, RendezvousError) or getattr(error, "is_known_to_all", False)


def announce_end(config: TrainConfig, node: Node, status: int, reason: str) -> None:
    """Notify the other nodes that this one exits before the rendezvous; waits for them up to `_ANNOUNCE_S` seconds."""
    peers = [other for other in range(config.topology.num_nodes) if other != node.rank]
    if config.topology.num_nodes == node.num_nodes_here:
        return
    reason = reason.partition("\n")[0]
    log.error(
        f"node {node.rank} exits ({reason}); notifying the other nodes for up to {_ANNOUNCE_S:g} s (Ctrl-C: exit now)"
    )
    import torch

    text = json.dumps({"node": node.rank, "status": status, "reason": reason})
    deadline, limit = time.monotonic() + _ANNOUNCE_S, timedelta(seconds=_ANNOUNCE_S)
    try:
        if node.rank > 0:
            _wait_for_store(node.address, node.port, deadline)
        store = torch.distributed.TCPStore(
            node.address, node.port, config.topology.world_size, node.rank == 0, limit, wait_for_workers=False
        )
        _write(store, _ENDED, text)
        if node.rank > 0:  # it may announce its own end, and waits for no receipt from this node then
            _write(store, _receipt_key(node.rank))
        else:
            receipts = [_receipt_key(other) for other in peers]
            while not _is_set(store, *receipts) and time.monotonic() < deadline:
                time.sleep(_POLL_S)
            time.sleep(_PEER_POLL_S)  # for the other ranks of these nodes
    except (RuntimeError, ValueError):
        return  # no other node is reachable
