from pathlib import Path

import pytest

from lit_glm.hardware.monitors import command_output
from lit_glm.metrics.system_info import source_commit

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
