"""Process group of a job: rendezvous, agreement on the configuration, and exit of all ranks if one fails."""

import functools
import logging
import os
import socket
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Callable, Dict, Iterator, List, Optional

from lit_glm.compat import registered_backends
from lit_glm.config.schema import TrainConfig
from lit_glm.errors import InputError
from lit_glm.hardware.runtimes.selection import check_device_count, make_runtime
from lit_glm.launch.heartbeat import STALL_MARGIN_S
from lit_glm.launch.peer_monitor import connect_peers, name_lost_peer
from lit_glm.launch.rendezvous import RunFolder, broadcast_through_store, join_rendezvous

log = logging.getLogger(__name__)

_LATER_S = 15.0


def collective_timeout_s(config: TrainConfig) -> float:
    """Return the timeout of collectives in seconds, for libraries that respect torch's timeout.

    The stall watchdog fires first, because only it can name the rank that hangs.
    """
    return config.run.stall_timeout_s + STALL_MARGIN_S + _LATER_S


@contextmanager
def process_group(
    config: TrainConfig, choose_run: Callable[[], Optional[RunFolder]] = lambda: None
) -> Iterator[Optional[RunFolder]]:
    """Open the process group that torchrun's environment variables describe; a single device opens none.

    An error inside the block also ends the other ranks, on all nodes.

    Args:
        config: configuration of the job.
        choose_run: called on rank 0; returns the run folder, which all ranks receive. Under the user's torchrun it is
            called after all ranks have joined, so that an error in it also ends the ranks of other nodes.

    Yields:
        The run folder that rank 0 chose; None for a job without one.

    Raises:
        InputError: if the number of devices differs from the topology, or the backend is not registered.
        RunError: if the nodes cannot reach each other, or a rank is lost.
        NothingToDo: if node 0 has found the run to be complete.
    """
    import torch

    runtime = make_runtime(config.hardware, config.topology)
    check_device_count(runtime, config.topology)
    local_rank = int(os.environ["LOCAL_RANK"])
    runtime.set_device(local_rank)
    if config.topology.world_size == 1:
        yield choose_run()
        return
    _check_backend(runtime.backend, config.hardware.name)
    timeout = timedelta(seconds=collective_timeout_s(config))
    external = "TORCHELASTIC_RUN_ID" in os.environ  # the user's torchrun already has a store
    rank = int(os.environ["RANK"])
    store, run, hosts = join_rendezvous(config, choose_run() if rank == 0 and not external else None, external)
    monitor = None
    if config.topology.num_nodes > 1 or external:  # else the supervisor of the node watches all ranks
        # Before the process group: if a node's collective library fails to start, the others would wait there for it.
        broadcast = functools.partial(broadcast_through_store, store)
        monitor = connect_peers(rank, hosts, os.environ["MASTER_ADDR"], broadcast)
    status = 0
    try:
        with name_lost_peer(monitor):
            world = config.topology.world_size
            torch.distributed.init_process_group(
                runtime.backend, timeout=timeout, store=store, rank=rank, world_size=world
            )
            if external:
                from lit_glm.hardware import object_collectives

                chosen = choose_run() if rank == 0 else None
                run = object_collectives.broadcast_object(chosen, runtime.device(local_rank))
            yield run
    except BaseException as error:
        status = getattr(error, "exit_status", 1)
        raise
    finally:
        if monitor is not None:
            monitor.announce_exit(status)


def _check_backend(backend: str, hardware: str) -> None:
    """Reject a collective backend that neither torch nor the runtime has registered.

    Raises:
        InputError: names the backend.
    """
    if backend.lower() not in registered_backends():
        raise InputError(
            f"hardware={hardware}: its collective backend {backend} is registered by neither torch nor the runtime; "
            "correct Runtime.backend, or import the package that registers it in the runtime"
        )


def assert_same_job_on_all_ranks(config_hash: str, step: int, device: Any) -> None:
    """Check that all ranks run the same configuration from the same step.

    Raises:
        InputError: names the first rank that differs.
    """
    import torch

    from lit_glm.hardware import object_collectives

    gathered = object_collectives.all_gather_object(
        (config_hash, step, os.environ.get("GROUP_RANK", "0"), socket.gethostname()), device
    )
    nodes: Dict[str, List[str]] = {}
    for rank, (name, start, node, host) in enumerate(gathered):
        nodes.setdefault(str(node), []).append(str(host))
        if name != gathered[0][0]:
            raise InputError(
                f"rank {rank} has a different configuration from rank 0: start every node with the same command"
            )
        if start != gathered[0][1]:
            raise InputError(
                f"rank {rank} would resume after step {start}, rank 0 after step {gathered[0][1]}: all nodes must see "
                "the same run folder (set hydra.run.dir to a folder on a shared disk)"
            )
    if len(nodes) > 1 and torch.distributed.get_rank() == 0:
        for node, hosts in sorted(nodes.items(), key=lambda entry: int(entry[0])):
            log.info(f"node {node}: {len(hosts)} rank{'s' * (len(hosts) > 1)} joined ({hosts[0]})")
