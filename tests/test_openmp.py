"""Threads of a step: by its work, by what the process may use, never over the user's own variables."""

import os
import subprocess
import sys
from typing import Any

import pytest

from lit_glm import openmp


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No variable of OpenMP's is set, and there are eight cores."""
    for name in (
        *openmp.THREAD_COUNT_VARIABLES,
        *openmp.SPIN_LIMITS,
        openmp.LAUNCHER_THREADS_VARIABLE,
        "OMP_WAIT_POLICY",
        "KMP_LIBRARY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(openmp, "available_cores", lambda: 8)
    return monkeypatch


def test_spin_limits_are_set_by_default(plain: pytest.MonkeyPatch) -> None:
    plain.setattr(os, "environ", {})
    openmp.limit_spinning()
    assert os.environ == openmp.SPIN_LIMITS


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_user_wait_policy_is_kept(plain: pytest.MonkeyPatch, name: str) -> None:
    plain.setattr(os, "environ", {name: "mine"})
    openmp.limit_spinning()
    assert os.environ == {name: "mine"}


@pytest.mark.parametrize(
    ("rows", "width", "devices", "before", "expected"),
    [
        (150, 64, 1, None, 1),  # four examples of the quickstart
        (2400, 64, 1, None, 7),
        (2657, 1024, 1, None, 8),
        (2657, 1024, 4, None, 2),
        (2657, 1024, 16, None, 1),
        (2657, 1024, 1, 3, 3),  # a run that goes on
        (2657, 1024, 1, 64, 8),  # on a smaller machine
    ],
)
def test_number_of_threads_depends_on_work_and_devices(
    plain: pytest.MonkeyPatch, rows: int, width: int, devices: int, before: Any, expected: int
) -> None:
    assert openmp.choose_num_threads(rows, width, devices, before) == expected


def test_user_thread_count_is_kept_and_launcher_count_may_be_lowered(plain: pytest.MonkeyPatch) -> None:
    plain.setenv("OMP_NUM_THREADS", "5")
    assert openmp.choose_num_threads(150, 64, 1, None) is None
    assert openmp.omp_env_for_ranks(2) == {}
    plain.setenv(openmp.LAUNCHER_THREADS_VARIABLE, "5")
    assert openmp.choose_num_threads(150, 64, 1, None) == 1


def test_ranks_share_the_cores(plain: pytest.MonkeyPatch) -> None:
    assert openmp.omp_env_for_ranks(2) == {"OMP_NUM_THREADS": "4", openmp.LAUNCHER_THREADS_VARIABLE: "4"}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_available_cores_respects_cpu_affinity() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from lit_glm.openmp import available_cores; print(available_cores())"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "1\n"


@pytest.mark.parametrize(("text", "expected"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 8)])
def test_available_cores_respects_cgroup_quota(monkeypatch: pytest.MonkeyPatch, text: str, expected: int) -> None:
    class File:
        def __init__(self, path: str) -> None:
            self._there = path.endswith("cpu.max")

        def read_text(self, encoding: str) -> str:
            if not self._there:
                raise FileNotFoundError
            return text

    monkeypatch.setattr(openmp, "Path", File)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert openmp.available_cores() == expected
