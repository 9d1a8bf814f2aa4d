"""Where a process stands among its nodes, and what it says when the environment does not fit the topology."""

import socket
import threading
import time
from types import SimpleNamespace

import pytest

from lit_glm.config.schema import TopologyConfig, TrainConfig
from lit_glm.errors import InputError
from lit_glm.launch import rendezvous
from lit_glm.launch.rendezvous import (
    Node,
    announce_end,
    check_node_count,
    check_port,
    free_port,
    is_external_rank,
    network_interface_to,
    resolve_node,
)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = ("SLURM_STEP_NUM_NODES", "SLURM_STEP_NUM_TASKS")
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "TORCHELASTIC_RUN_ID", *slurm):
        monkeypatch.delenv(name, raising=False)


def test_single_node_uses_a_free_port() -> None:
    node = resolve_node(TopologyConfig(1, 2))
    assert (node.rank, node.address, node.port) == (0, "127.0.0.1", 0)  # the supervisor takes a free one
    check_port(free_port())


def test_multiple_nodes_require_rendezvous_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_RANK", "1")
    with pytest.raises(InputError, match="missing here: MASTER_ADDR, MASTER_PORT"):
        resolve_node(TopologyConfig(2, 8))
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    node = resolve_node(TopologyConfig(2, 8))
    assert (node.rank, node.address, node.port) == (1, "10.0.0.1", 29500)


def test_slurm_step_with_several_tasks_error_gives_srun_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "")
    check_node_count(TopologyConfig(1, 2))
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")  # srun -n4 --pty bash
    with pytest.raises(InputError, match="with `srun --nodes=1 --ntasks=1 --pty bash`"):
        check_node_count(TopologyConfig(1, 2))


def test_a_host_name_that_cannot_be_resolved_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("NODE_RANK", "1"), ("MASTER_ADDR", "no-such-host.invalid"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="MASTER_ADDR=no-such-host.invalid: this host name cannot be resolved"):
        resolve_node(TopologyConfig(2, 8))


@pytest.mark.parametrize(
    ("name", "value"), [("NODE_RANK", "2"), ("NODE_RANK", "one"), ("MASTER_PORT", "70000"), ("MASTER_PORT", "0")]
)
def test_a_variable_out_of_range(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, text in {"MASTER_ADDR": "h", "MASTER_PORT": "29500", "NODE_RANK": "0", name: value}.items():
        monkeypatch.setenv(key, text)
    with pytest.raises(InputError, match=f"{name}={value}: must be a number from [01] to"):
        resolve_node(TopologyConfig(2, 8))


def test_slurm_node_count_must_match_the_topology(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, text in {
        "MASTER_ADDR": "h",
        "MASTER_PORT": "29500",
        "NODE_RANK": "0",
        "SLURM_STEP_NUM_NODES": "3",
    }.items():
        monkeypatch.setenv(key, text)
    with pytest.raises(InputError, match="topology=2x8 has 2 nodes, but Slurm started 3"):
        resolve_node(TopologyConfig(2, 8))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("SLURM_STEP_NUM_NODES", "2", "Slurm started 2"),
        ("SLURM_STEP_NUM_TASKS", "8", "Slurm started 8 tasks: use one task per node"),
        ("NODE_RANK", "1", "NODE_RANK=1"),
    ],
)
@pytest.mark.parametrize("devices", [1, 8])
def test_single_node_topology_on_several_nodes_is_rejected(
    name: str, value: str, said: str, devices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"topology=1x{devices} has 1 node, but {said}"):
        check_node_count(TopologyConfig(1, devices))


def test_single_slurm_task_is_a_single_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    monkeypatch.setenv("NODE_RANK", "0")
    assert resolve_node(TopologyConfig(1, 8)).rank == 0


def test_busy_master_port_is_rejected() -> None:
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen(1)
        port = busy.getsockname()[1]
        with pytest.raises(InputError, match=f"MASTER_PORT={port}: is in use on this machine"):
            check_port(port)
    check_port(port)


def test_nodes_that_both_end_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a sweep of which both reject a job: the next one must not read that announcement."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config, begun = TrainConfig(topology=TopologyConfig(2, 1)), time.monotonic()
    nodes = [
        threading.Thread(target=announce_end, args=(config, Node(rank, "127.0.0.1", port), 2, "bs=64: too large"))
        for rank in (0, 1)
    ]
    for node in nodes:
        node.start()
    for node in nodes:
        node.join()
    assert time.monotonic() - begun < rendezvous._ANNOUNCE_S / 2
    check_port(port)


def test_external_torchrun_must_match_the_topology(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_external_rank(TopologyConfig(1, 2))
    ranks = {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    for key, text in ranks.items():
        monkeypatch.setenv(key, text)
    assert is_external_rank(TopologyConfig(2, 2))
    with pytest.raises(InputError, match="topology=1x2 has 2 ranks, 2 per node, but torchrun started 4, 2 per node"):
        is_external_rank(TopologyConfig(1, 2))


def test_network_interface_to_localhost_is_loopback() -> None:
    assert network_interface_to("127.0.0.1") == "lo"
    assert network_interface_to("no such host.invalid") is None


def test_network_interface_for_loopback_hostname_uses_default_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Debian and Ubuntu set a host up: 127.0.1.1 in /etc/hosts."""
    eth = SimpleNamespace(family=socket.AF_INET, address="10.0.0.5")
    lo = SimpleNamespace(family=socket.AF_INET, address="127.0.1.1")
    monkeypatch.setattr("psutil.net_if_addrs", lambda: {"lo": [lo], "eth0": [eth]})
    monkeypatch.setattr(rendezvous, "_source_address_to", {"node0": "127.0.1.1", "192.0.2.1": "10.0.0.5"}.get)
    assert network_interface_to("node0") == "eth0"
