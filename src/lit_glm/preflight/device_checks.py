"""Checks of runtime, devices, precision and port, and an all-reduce over all ranks of the topology."""

import os
from typing import List

from lit_glm.check_result import CheckResult
from lit_glm.config.hydra_main import CONF_DIR
from lit_glm.config.schema import TrainConfig
from lit_glm.errors import InputError
from lit_glm.hardware.runtimes.base import Runtime
from lit_glm.hardware.runtimes.selection import check_device_count, make_runtime, validate_devices

_LIMIT_S = 6.0


def check_runtime(config: TrainConfig, kept: List[str]) -> CheckResult:
    """Create the runtime.

    Args:
        config: configuration of the run.
        kept: messages about variables of the hardware file that the environment sets already.
    """
    made = make_runtime(config.hardware, config.topology)
    version = f", driver {made.driver_version()}" if made.has_driver else ""
    said = f"{made.name} for {config.hardware.name}{version}"
    if made.simulated:
        return CheckResult(
            "", "warn", f"{said}: simulated on the CPU", "no measurement is that of the device", artifact=made
        )
    if kept:
        return CheckResult("", "warn", said, "; ".join(kept), artifact=made)
    return CheckResult("", "ok", said, artifact=made)


def check_devices(config: TrainConfig, made: Runtime) -> CheckResult:
    """Compare the devices with topology and hardware file."""
    unable = made.multi_node_unsupported_reason(config.topology.num_nodes)
    if unable is not None:
        raise InputError(f"topology={config.topology.name}: {unable}")
    check_device_count(made, config.topology)
    devices = config.topology.devices_per_node
    hints = validate_devices(config.hardware, made, devices, CONF_DIR / "hardware")
    names: List[str] = []
    for index in range(devices):
        total = made.total_memory(index)
        size = "memory unknown" if total is None else f"{total / 2**30:.1f} GiB"
        names.append(f"{made.device_name(index) or config.hardware.product_name} ({size})")
    kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    said = f"{made.device_count()} devices visible, {devices} required per node: {kinds}"
    return CheckResult("", "warn" if hints else "ok", said, "; ".join(hints))


def check_precision(config: TrainConfig, made: Runtime) -> CheckResult:
    """Check the precision with a small matrix product."""
    from lit_glm.hardware.precision import make_precision

    plugin = make_precision(config, made)
    said = f"{config.precision.name}: matrix products are computed in {str(plugin.computes_in).replace('torch.', '')}"  # type: ignore[attr-defined]
    hint = made.precision_hint(config.precision.name)
    return CheckResult("", "warn" if hint else "ok", said, hint)


def check_rendezvous_port(config: TrainConfig, made: Runtime) -> CheckResult:
    """Check that the rendezvous port is available."""
    from lit_glm.launch.nodes import check_port, resolve_node

    if config.topology.world_size == 1:
        given = os.environ.get("MASTER_PORT", "")
        if given.isdigit():
            try:
                check_port(int(given))
            except InputError as error:
                return CheckResult("", "warn", str(error), "a single device needs none")
        return CheckResult("", "skip", "single device: no rendezvous")
    node = resolve_node(config.topology, config.hardware.runtime == "simulated")
    chosen = "" if os.environ.get("MASTER_PORT") else " (a free port, chosen for each job; MASTER_PORT sets it)"
    return CheckResult("", "ok", f"node {node.rank} of {config.topology.num_nodes}, {node.address}:{node.port}{chosen}")


def check_collectives(config: TrainConfig, made: Runtime) -> CheckResult:
    """Start all ranks of this node and run an all-reduce over all ranks of the topology."""
    if config.topology.world_size == 1:
        return CheckResult("", "skip", "single device: no collectives")
    from lit_glm.launch.all_ranks import run_on_all_ranks

    measured = run_on_all_ranks(config, "lit_glm.preflight.all_reduce", _LIMIT_S)
    if measured is None:
        return CheckResult("", "ok", "all-reduce with the other nodes passed; node 0 prints the timing")
    return CheckResult(
        "",
        "ok",
        f"{measured['ranks']} ranks over {measured['backend']}: all-reduce correct, {measured['mib']:g} MiB in "
        f"{1000 * measured['seconds']:.1f} ms ({measured['gib_per_s']:.2f} GiB/s per rank), "
        f"latency {1e6 * measured['latency_s']:.0f} us",
    )
