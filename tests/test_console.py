"""Messages of a command: where they go, by which level; a program that imports the package keeps its own handlers."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import List

import pytest

from conftest import lit_glm, start_command


@pytest.mark.process
@pytest.mark.parametrize(
    ("level", "out", "err"),
    [(None, True, True), ("WARNING", False, True), ("warning", False, True), ("ERROR", False, False)],
)
def test_the_variable_sets_the_lowest_level(level: str, out: bool, err: bool, tmp_path: Path) -> None:
    run = ["experiment=debug", "run.max_steps=1", "run.evaluate=false"]
    env = {"LIT_GLM_LOG": level} if level else {}
    warned = [*run, "hardware.env={KEPT: theirs}"]
    done = lit_glm("train", *warned, cwd=tmp_path, env={**env, "KEPT": "mine"})
    assert done.returncode == 0, done.stderr
    assert ("lit_glm: run folder" in done.stdout) == out
    assert ("keeping KEPT=mine" in done.stderr) == err
    assert "| cpu 1x1" in done.stdout  # the result, whatever the level


@pytest.mark.process
@pytest.mark.parametrize("words", [["trian"], ["plan", "bs=interval(1,8)"], ["report", "--sort", "x", "."]])
def test_each_message_starts_with_the_program_name(words: List[str], tmp_path: Path) -> None:
    done = lit_glm("__main__", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert all(line.startswith("lit_glm: ") for line in done.stderr.splitlines()), done.stderr


@pytest.mark.process
def test_commands_in_messages_work_as_printed(tmp_path: Path) -> None:
    run = ["experiment=debug", "run.max_steps=1", "run.evaluate=false"]
    done = lit_glm("train", *run, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"})
    assert f"report: {sys.executable} -m lit_glm.report" in done.stdout
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    done = lit_glm("train", *run, cwd=tmp_path, env={"PATH": path})
    assert "report: python -m lit_glm.report" in done.stdout


@pytest.mark.process
@pytest.mark.parametrize("command", ["verify", "doctor"])
def test_ctrl_c_ends_a_command_without_a_traceback(command: str, tmp_path: Path) -> None:
    process = start_command(command, "experiment=debug", cwd=tmp_path)
    assert process.stdout is not None
    first = process.stdout.readline()  # it has begun to work
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, "lit_glm: interrupted by SIGINT" in err) == (130, True), first + err
    assert "Traceback" not in err


@pytest.mark.process
@pytest.mark.parametrize("command", ["train", "report", "__main__"])
def test_ctrl_c_while_modules_are_imported(command: str, tmp_path: Path) -> None:
    (tmp_path / "argparse.py").write_text("import time\nopen('importing', 'w').close()\ntime.sleep(60)\n")
    process = start_command(command, *["train"] * (command == "__main__"), cwd=tmp_path, cold=True)
    limit = time.monotonic() + 60
    while not (tmp_path / "importing").exists() and time.monotonic() < limit:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "lit_glm: interrupted by SIGINT\n")


def test_an_unknown_level_is_named(tmp_path: Path) -> None:
    done = lit_glm("prepare", "--help", cwd=tmp_path, env={"LIT_GLM_LOG": "loud"})
    assert done.returncode == 0
    assert "lit_glm: LIT_GLM_LOG=LOUD: must be one of DEBUG, INFO, WARNING, ERROR; using INFO" in done.stderr


@pytest.mark.slow
def test_a_program_that_imports_the_package_captures_messages() -> None:
    code = (
        "import logging\n"
        "from lit_glm.training.evaluation import em_and_f1\n"
        "logging.basicConfig(format='%(name)s %(message)s', level='INFO')\n"
        "from lit_glm.config import hydra_main\n"
        "hydra_main.log.info('captured')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "lit_glm.config.hydra_main captured"


@pytest.mark.process
def test_the_shell_completes_commands_and_keys() -> None:
    script = """
    eval "$(lit-glm -sc install=bash)"
    for line in "lit-glm tr" "lit-glm train hard" "lit-glm train hardware=h"; do
      COMP_LINE=$line COMP_POINT=${#line}; read -ra COMP_WORDS <<< "$line"; COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
      export COMP_LINE COMP_POINT; _lit_glm_complete; echo "${COMPREPLY[*]}"
    done
    """
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env={"PATH": path})
    lines: List[str] = done.stdout.splitlines()
    assert lines[0].strip() == "train"
    assert "hardware=" in lines[1].split()
    assert set(lines[2].split()) == {"hardware=h100", "hardware=h200"}
