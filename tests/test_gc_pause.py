"""The collector rests while much is imported, leaves that out afterwards, and is as it was before."""

import gc
import sys
from types import ModuleType

import pytest

from lit_glm.process_utils import paused_gc


def test_gc_is_paused_only_inside_the_context() -> None:
    with paused_gc():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with paused_gc():
            pass
        assert not gc.isenabled()  # whoever calls decides
    finally:
        gc.enable()


def test_gc_is_enabled_again_after_an_error() -> None:
    with pytest.raises(ImportError), paused_gc():
        raise ImportError("no such module")
    assert gc.isenabled()


@pytest.mark.parametrize(("modules", "frozen"), [(150, True), (1, False)])
def test_gc_freezes_only_after_many_new_imports(modules: int, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep's next job imports nothing new: what the one before has left must not stay for ever."""
    done = []
    monkeypatch.setattr(gc, "freeze", lambda: done.append(True))
    for number in range(modules):
        monkeypatch.setitem(sys.modules, f"none_{number}", ModuleType("none"))
    with paused_gc():
        pass
    assert not done
    with paused_gc():
        for number in range(modules):
            monkeypatch.setitem(sys.modules, f"new_{number}", ModuleType("new"))
    assert bool(done) is frozen
