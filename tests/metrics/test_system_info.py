from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.config.schema import TrainConfig
from lit_glm.hardware.monitors import command_output
from lit_glm.hardware.runtimes.cpu import CPURuntime
from lit_glm.metrics.system_info import describe_system, source_commit

pytestmark = pytest.mark.skipif(command_output("git", "--version") == "", reason="needs git")


def _commit(folder: Path, *files: str) -> None:
    name = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    command_output("git", "-C", str(folder), "add", *files)
    command_output("git", "-C", str(folder), *name, "commit", "-q", "-m", "x")


def test_source_commit_is_that_of_the_package_checkout(tmp_path: Path) -> None:
    command_output("git", "init", "-q", str(tmp_path))
    own, installed = tmp_path / "src", tmp_path / ".venv" / "package"
    for folder in (own, installed):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
    _commit(tmp_path, "src/__init__.py")
    commit, is_changed = source_commit(own)
    assert commit is not None
    assert len(commit) == 40
    assert is_changed is False
    (own / "__init__.py").write_text("a = 1\n")
    assert source_commit(own) == (commit, True)
    assert source_commit(installed) == (None, None)


def test_there_is_no_commit_outside_a_checkout(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text("")
    assert source_commit(tmp_path) == (None, None)


def test_report_keys_take_precedence_over_what_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_GLM_CONTAINER_IMAGE", "image:found")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=int(23.47 * 2**30)))
    keys = {"machine": "R480-X8", "image": "image:v1", "driver": "4.0", "device_name": "R300", "network": "200 Gb/s"}
    detected, overridden = (
        describe_system(
            validate_config(compose_config("train", ["experiment=debug", *given]), TrainConfig), CPURuntime(), ["train"]
        )
        for given in ([], [f"report.{key}='{value}'" for key, value in keys.items()])
    )
    names = [{"image": "container_image"}.get(key, key) for key in keys]
    assert [overridden[name] for name in names] == list(keys.values())
    assert detected["container_image"] == "image:found"
    assert not set(keys.values()) & set(map(str, detected.values()))
    assert (detected["memory_gib"], overridden["memory_gib"]) == (23.5, 23.5)
