"""Runtime, cards, arithmetic, port, and a real all-reduce between all ranks of the topology."""

import os
from typing import List

from lit_glm.check_result import Finding
from lit_glm.config.hydra_main import CONF
from lit_glm.config.schema import TrainConfig
from lit_glm.errors import InputError
from lit_glm.hardware.runtimes.base import Runtime
from lit_glm.hardware.runtimes.selection import check_cards, check_devices, make_runtime

_LIMIT_S = 6.0


def runtime(config: TrainConfig, kept: List[str]) -> Finding:
    """Make the runtime.

    Args:
        config: of the run.
        kept: what is to be said of the chip's environment variables, which are set already.
    """
    made = make_runtime(config.hardware, config.topology)
    version = f", driver {made.driver_version()}" if made.has_driver else ""
    said = f"{made.name} for {config.hardware.name}{version}"
    if made.simulated:
        return Finding("", "warn", f"{said}: a rehearsal on the processor", "no figure of it is the chip's", made=made)
    if kept:
        return Finding("", "warn", said, "; ".join(kept), made=made)
    return Finding("", "ok", said, made=made)


def cards(config: TrainConfig, made: Runtime) -> Finding:
    """Compare the devices with topology and hardware file."""
    unable = made.cannot_span(config.topology.num_nodes)
    if unable is not None:
        raise InputError(f"topology={config.topology.name}: {unable}")
    check_devices(made, config.topology)
    devices = config.topology.devices_per_node
    hints = check_cards(config.hardware, made, devices, CONF / "hardware")
    names: List[str] = []
    for index in range(devices):
        total = made.total_memory(index)
        size = "memory unknown" if total is None else f"{total / 2**30:.1f} GiB"
        names.append(f"{made.device_name(index) or config.hardware.card} ({size})")
    kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    said = f"{made.device_count()} visible, {devices} a node wanted: {kinds}"
    return Finding("", "warn" if hints else "ok", said, "; ".join(hints))


def arithmetic(config: TrainConfig, made: Runtime) -> Finding:
    """Compute a small product in the precision."""
    from lit_glm.hardware.precision import make_precision

    plugin = make_precision(config, made)
    said = f"{config.precision.name}: products come out in {str(plugin.computes_in).replace('torch.', '')}"  # type: ignore[attr-defined]
    hint = made.precision_hint(config.precision.name)
    return Finding("", "warn" if hint else "ok", said, hint)


def port(config: TrainConfig, made: Runtime) -> Finding:
    """Find out whether the ranks can meet."""
    from lit_glm.launch.nodes import check_port, this_node

    if config.topology.world_size == 1:
        given = os.environ.get("MASTER_PORT", "")
        if given.isdigit():
            try:
                check_port(int(given))
            except InputError as error:
                return Finding("", "warn", str(error), "one device needs none")
        return Finding("", "skip", "one device: no ranks meet")
    node = this_node(config.topology, config.hardware.runtime == "simulated")
    chosen = "" if os.environ.get("MASTER_PORT") else " (a free one, chosen for each job; MASTER_PORT sets it)"
    return Finding("", "ok", f"node {node.rank} of {config.topology.num_nodes}, {node.address}:{node.port}{chosen}")


def collectives(config: TrainConfig, made: Runtime) -> Finding:
    """Start all ranks of this node and sum over all ranks of the topology."""
    if config.topology.world_size == 1:
        return Finding("", "skip", "one device: there is nothing to exchange")
    from lit_glm.launch.all_ranks import on_all_ranks

    measured = on_all_ranks(config, "lit_glm.preflight.all_reduce", _LIMIT_S)
    if measured is None:
        return Finding("", "ok", "this node's ranks have summed with the others'; node 0 has the figures")
    return Finding(
        "",
        "ok",
        f"{measured['ranks']} ranks over {measured['backend']}: sums are right, {measured['mib']:g} MiB in "
        f"{1000 * measured['seconds']:.1f} ms ({measured['gib_per_s']:.2f} GiB/s a rank), "
        f"smallest {1e6 * measured['latency_s']:.0f} us",
    )
