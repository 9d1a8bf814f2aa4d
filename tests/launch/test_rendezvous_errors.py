"""With which error a rank ends because another node has ended before all had met."""

import json
import threading
from datetime import timedelta
from typing import Any, List

import pytest
import torch

from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.config.schema import TrainConfig
from lit_glm.errors import InputError, RunError
from lit_glm.launch import rendezvous
from lit_glm.launch.rendezvous import NothingToDo, _error_of, is_known_to_all
from lit_glm.launch.signals import Interrupted
from runs.processes import free_port


@pytest.mark.parametrize(("status", "kind"), [(0, NothingToDo), (1, RunError), (2, InputError), (143, Interrupted)])
def test_node_exits_with_the_status_of_the_first_exited_node(status: int, kind: type) -> None:
    error = _error_of({"status": status, "node": 0, "reason": "some reason"})
    assert type(error) is kind
    assert getattr(error, "exit_status", 0) == status
    assert is_known_to_all(error)
    assert not is_known_to_all(Interrupted(15) if kind is Interrupted else kind("an error of its own"))


def test_joined_ranks_are_notified_of_a_signal_to_node_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store ends with rank 0; without notice they would see a lost connection."""
    port = free_port()
    heard: List[Any] = []
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "GROUP_RANK": "0"}.items():
        monkeypatch.setenv(name, value)

    def joined_rank() -> None:
        store = torch.distributed.TCPStore("127.0.0.1", port, 3, False, timedelta(seconds=60), wait_for_workers=False)
        heard.append(json.loads(store.get(rendezvous._ENDED)))

    other = threading.Thread(target=joined_rank)

    def signal_comes(*_: Any) -> None:
        other.start()
        raise Interrupted(15)

    monkeypatch.setattr(rendezvous, "_wait", signal_comes)
    monkeypatch.setattr(rendezvous, "_PEER_POLL_S", 0.0)
    monkeypatch.setattr(rendezvous.time, "sleep", lambda _: other.join(60))
    three = ["topology.num_nodes=3", "topology.devices_per_node=1"]
    config = validate_config(compose_config("train", ["experiment=debug", *three]), TrainConfig)
    with pytest.raises(Interrupted):
        rendezvous.join_rendezvous(config, None)
    assert [(end["node"], end["status"]) for end in heard] == [(0, 143)]
