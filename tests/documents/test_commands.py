"""Every command of README and docs is run, so that none can rot: with glm_tiny, generated news and simulated cards in
place of what is not here. What cannot be run (git, pip, containers, a cluster's own programs) is listed, and its
scripts and its part for `train` are checked.
"""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any, List, Tuple

import pytest
import torch
import yaml

from conftest import CHECKPOINT, GOLDEN, lit_glm_here
from lit_glm.verification import timing_check

pytestmark = pytest.mark.skipif(torch.__version__.startswith("1."), reason="the pages are tried on the current stack")
ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = (
    "git ", "pip ", "docker ", "python3.8 ", ". .venv", "sudo ", "apt-get ", "sbatch ", "srun ", "torchrun ",
    "python -m pytest ", "bash scripts/", "lit_glm:", "export ", "cd ", "tar ", "unzip ", "xpu_smi", "#",
)  # fmt: skip
"""Beginnings of lines that are not run here: they need a network, a cluster, or the time of all tests."""
TINY = [
    "model=glm_tiny", "data=synthetic", "data.synthetic.num_train=24", "data.synthetic.num_eval=6", "run.max_steps=2",
    "run.eval_interval_samples=1000000", "callbacks=none",
]  # fmt: skip
DROPPED = (
    "model.init_checkpoint=",
    "data.vocab_file=",
    "run.max_steps=",
    "callbacks",
    "model=",
    "data=",
    "experiment=",
)


def commands() -> List[Tuple[str, str]]:
    """(page, command) of all shell blocks, continued lines joined, remarks cut off."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                text = re.sub(r"\s+#.*$", "", line).strip()
                if text:
                    found.append((page.name, text))
    return found


RUN = sorted({(page, text) for page, text in commands() if re.match(r"(python -m lit_glm\.|lit-glm )", text)})


def test_every_documented_command_is_run_or_listed_as_not_run() -> None:
    assert len(RUN) > 25
    for page, text in commands():
        assert (page, text) in RUN or text.startswith(NOT_RUN), f"{page}: {text}"


def test_scripts_that_are_named_exist() -> None:
    for page in PAGES:
        for script in re.findall(r"\b(scripts/\w+\.sh|benchmarks/\w+\.(?:py|md))\b", page.read_text(encoding="utf-8")):
            assert (ROOT / script).is_file(), f"{page.name}: {script}"


def test_overrides_of_documented_launcher_commands_compose(capfd: Any) -> None:
    launched = [text for _, text in commands() if re.match(r"(torchrun|srun|sbatch|bash scripts/launch)", text)]
    assert len(launched) >= 5
    for text in launched:
        overrides = re.findall(r"\b(?:hardware|topology|precision|experiment|bs)=[\w.]+", text)
        assert lit_glm_here("train", *overrides, "--cfg", "job") == 0, capfd.readouterr().err
        assert "topology:" in capfd.readouterr().out


def test_kubernetes_manifest_matches_the_topology() -> None:
    (block,) = re.findall(r"```yaml\n(apiVersion.*?)```", (ROOT / "docs" / "clusters.md").read_text(), flags=re.DOTALL)
    job = yaml.safe_load(block)
    specs = job["spec"]["pytorchReplicaSpecs"]
    nodes = sum(spec["replicas"] for spec in specs.values())
    for spec in specs.values():
        (container,) = spec["template"]["spec"]["containers"]
        arguments = [str(argument) for argument in container["args"]]
        assert f"--nnodes={nodes}" in arguments
        assert f"--nproc_per_node={job['spec']['nprocPerNode']}" in arguments
        assert f"topology={nodes}x{job['spec']['nprocPerNode']}" in arguments
        assert container["resources"]["limits"]["nvidia.com/gpu"] == int(job["spec"]["nprocPerNode"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the pages name."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(str(GOLDEN / "record_jsonl"), str(place / "ReCoRD"))
    for name in ("vocab.txt", "bert-large-uncased-vocab.txt"):
        shutil.copy(str(GOLDEN / "bert-large-uncased-vocab.txt"), str(place / name))
    shutil.copytree(str(CHECKPOINT), str(place / "blocklm-large-blank"))
    chip = re.search(
        r"```yaml\n# own/hardware/newchip.yaml\n(.*?)```", (ROOT / "docs" / "new_chip.md").read_text(), re.DOTALL
    )
    assert chip is not None
    (place / "own" / "hardware").mkdir(parents=True)
    (place / "own" / "hardware" / "newchip.yaml").write_text(chip.group(1))
    run = [*TINY, f"data.out_dir={place}/news", "run.max_steps=12"]
    assert lit_glm_here("train", *run, "bs=4", f"hydra.run.dir={place}/outputs/laptop") == 0
    for folder in ("outputs/r300-1x1", "multirun/first/0", "multirun/rehearsal/0"):
        shutil.copytree(str(place / "outputs" / "laptop"), str(place / folder))
    return place


def adapt_arguments(command: str, arguments: List[str], place: Path) -> List[str]:
    """The same command, with small things in place of what is not here."""
    if command in ("report", "export", "prepare") or "--cfg" in arguments:
        return [argument.replace("RUN_DIR", "outputs/laptop") for argument in arguments]
    if command == "evaluate":
        return arguments
    kept = [argument for argument in arguments if not argument.startswith(DROPPED) and argument != "-m"]
    kept = [re.sub(r"^topology=.*", "topology=1x1", re.sub(r"=([^,=]+),.*", r"=\1", text)) for text in kept]
    kept = [re.sub(r"^(bs|hydra\.run\.dir|hydra\.sweep\.dir)=.*", "", text) for text in kept]
    kept = [re.sub(r"^plan\.runs=.*", "plan.runs=outputs/laptop", text) for text in kept]
    kept = [text for text in kept if text and not text.startswith(("hydra/", "hydra.launcher"))]
    if not any(text.startswith("hardware=cpu") for text in kept) and any("hardware=" in text for text in kept):
        kept = [text for text in kept if not text.startswith("hardware.runtime=")] + ["hardware.runtime=simulated"]
    small = [*TINY, f"data.out_dir={place}/news"]
    if command == "tune":
        small += ["tune.steps=4", "tune.repeats=1", "tune.max_minutes=0.1"]
    if command == "verify" and "hardware.runtime=simulated" in kept:
        return [*(text for text in kept if text != "--json"), "--cfg", "job"]  # the processor's is run in tests/verify
    if command == "verify":
        return [*(text for text in kept if not text.startswith("precision=")), "precision=fp32", "model=glm_tiny"]
    if command == "plan":
        small += ["plan.device_counts=[1]"]
    if "bs=auto" in arguments:
        small += ["bs=auto"]
    return [*kept, *small] if "bs=auto" in small or command in ("plan", "tune") else [*kept, *small, "bs=2"]


@pytest.mark.parametrize(("page", "text"), RUN)
def test_documented_command_runs(
    page: str, text: str, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(timing_check, "_AT_LEAST_S", 0.02)  # of verify: its figures are not looked at here
    monkeypatch.setattr(timing_check, "_BYTES", (2**20, 2**20))
    words = shlex.split(text)
    command, arguments = (words[2].split(".")[1], words[3:]) if words[0] == "python" else (words[1], words[2:])
    run = adapt_arguments(command, arguments, place)
    status = lit_glm_here(command, *run)
    said = capfd.readouterr()
    allowed = {0, 1} if command in ("doctor", "verify", "tune") or "--check" in run else {0}
    assert status in allowed, f"{page}: {text}\nrun as {run}\n{said.err[-2000:]}"
    assert "Traceback" not in said.err
