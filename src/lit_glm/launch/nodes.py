"""Node rank and rendezvous address of this process, read from the launcher's environment and checked."""

import errno
import os
import socket
from dataclasses import dataclass
from typing import Optional

import psutil

from lit_glm.config.schema import TopologyConfig
from lit_glm.errors import InputError


@dataclass(frozen=True)
class Node:
    """Rank and rendezvous address of this node."""

    rank: int
    address: str
    """Address of node 0."""
    port: int
    """Port on which node 0 waits for the others."""
    num_nodes_here: int = 1
    """Number of nodes simulated on this machine (simulated runtime without MASTER_ADDR)."""


def this_node(topology: TopologyConfig, rehearses: bool) -> Node:
    """Find this node's rank and the rendezvous address; a single node's port is chosen when its ranks start.

    Raises:
        InputError: if the environment does not define which node this is, or contradicts the topology.
    """
    check_node_count(topology)
    return resolve_node(topology, rehearses) if topology.num_nodes > 1 else Node(0, "127.0.0.1", 0)


def resolve_node(topology: TopologyConfig, rehearses: bool = False) -> Node:
    """Find this node's rank and address; several nodes need MASTER_ADDR, MASTER_PORT and NODE_RANK in the environment.

    Args:
        topology: number of nodes and devices.
        rehearses: whether devices are simulated, in which case one machine can run the ranks of all nodes.

    Raises:
        InputError: if a variable is missing or does not fit the topology, or if the port is in use.
    """
    check_node_count(topology)
    if topology.num_nodes == 1:
        port = os.environ.get("MASTER_PORT")
        if port is None:
            return Node(0, "127.0.0.1", _free_port())
        node = Node(0, "127.0.0.1", _int_from_env("MASTER_PORT", 65535))
        check_port(node.port)
        return node
    if rehearses and not any(os.environ.get(name) for name in ("MASTER_ADDR", "NODE_RANK", "SLURM_JOB_ID")):
        return Node(0, "127.0.0.1", _free_port(), topology.num_nodes)
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
    has = f"topology={topology.name} has {nodes} node{'s' * (nodes > 1)}"
    found, tasks = (os.environ.get(f"SLURM_STEP_NUM_{what}", "") for what in ("NODES", "TASKS"))
    inside = (
        "this process runs in a step of srun (SLURM_STEP_NUM_NODES, SLURM_STEP_NUM_TASKS); start an interactive shell "
        "with `srun --nodes=1 --ntasks=1 --pty bash`, or unset these variables"
    )
    if found.isdigit() and int(found) != nodes:  # an empty value carries no information
        raise InputError(f"{has}, but Slurm started {found}: {inside}")
    if tasks.isdigit() and int(tasks) != nodes:
        raise InputError(
            f"{has}, but Slurm started {tasks} tasks: use one task per node, train starts the ranks; {inside}"
        )
    if nodes == 1 and os.environ.get("NODE_RANK", "0") not in ("", "0"):
        raise InputError(
            f"{has}, but NODE_RANK={os.environ['NODE_RANK']}: unset it, or choose the topology of all nodes"
        )


def _int_from_env(name: str, highest: int) -> int:
    text = os.environ[name]
    if not text.isdigit() or int(text) > highest:
        raise InputError(f"{name}={text}: must be a number from 0 to {highest}")
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def network_interface_to(address: str) -> Optional[str]:
    """Return the network interface by which this machine reaches an address; None if unknown."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing, only selects the route
            own = probe.getsockname()[0]
        for name, entries in psutil.net_if_addrs().items():
            if any(entry.family == socket.AF_INET and entry.address == own for entry in entries):
                return str(name)
    except OSError:
        pass
    return None


@dataclass(frozen=True)
class ExternalRank:
    """Rank of this process under a torchrun that the user started."""

    rank: int
    local_rank: int


def external_rank(topology: Optional[TopologyConfig] = None) -> Optional[ExternalRank]:
    """Return this process's rank under the user's torchrun; None if torchrun did not start it.

    Raises:
        InputError: if the number of ranks differs from the topology.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or "LOCAL_RANK" not in os.environ:
        return None
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if topology is not None and (world != topology.world_size or local not in (0, topology.devices_per_node)):
        raise InputError(
            f"topology={topology.name} has {topology.world_size} ranks, {topology.devices_per_node} per node, "
            f"but torchrun started {world}, {local} per node; they must be equal"
        )
    return ExternalRank(int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]))
