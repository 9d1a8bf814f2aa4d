"""With which error a rank ends because another node has ended before all had met."""

import pytest

from lit_glm.errors import InputError, RunError
from lit_glm.launch.rendezvous import NothingToDo, _error_of, is_known_to_all
from lit_glm.launch.signals import Interrupted


@pytest.mark.parametrize(("status", "kind"), [(0, NothingToDo), (1, RunError), (2, InputError), (143, Interrupted)])
def test_a_node_ends_as_the_one_that_ended_first(status: int, kind: type) -> None:
    error = _error_of({"status": status, "node": 0, "reason": "some reason"})
    assert type(error) is kind
    assert getattr(error, "exit_status", 0) == status
    assert is_known_to_all(error)
    assert not is_known_to_all(Interrupted(15) if kind is Interrupted else kind("an error of its own"))
