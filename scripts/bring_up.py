"""First tests of a new device: one change at a time from bf16, shared_context, eager; see bring_up.sh.

Each step is a command of this project with its own time limit. The page quotes what the commands measured; steps that
failed, or for which no time was left, are listed.
"""

import argparse
import importlib.util
import json
import math
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional

_STEPS = 20
_SEQUENCES = ["data=synthetic", "data.synthetic.lengths=record", "data.synthetic.num_train=4000"]
_SHORT = [f"run.max_steps={_STEPS}", "run.max_samples=100000000", "run.evaluate=false", "data.synthetic.num_eval=50"]
_SHORT += ["run.checkpoint_interval_steps=null", "callbacks=none", "logger=none"]
_KEYS_OF_STEPS = ("bs", "precision", "precision.tf32", "scoring", "callbacks", "run.evaluate")
_KEYS_OF_STEPS += ("model.attention", "model.activation_checkpointing", "model.compile")
"""Keys that a row of the page is named after: with another value the row would have a wrong name."""
_TINY = ["model=glm_tiny", "model.max_sequence_length=512", "data.synthetic.num_train=300"]


@dataclass
class Step:
    """One command."""

    name: str
    command: str
    """train, verify, evaluate, or kit."""
    arguments: List[str] = field(default_factory=list)
    limit_s: float = 120.0
    status: str = "not run: no time was left"
    seconds: float = 0.0
    run_dir: Optional[Path] = None
    lines: List[str] = field(default_factory=list)

    @property
    def result(self) -> Dict[str, Any]:
        """Content of the run's result.json; empty if there is none."""
        try:
            content = json.loads((self.run_dir / "result.json").read_text()) if self.run_dir is not None else {}
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}


def plan_steps(tiny: bool, overrides: List[str], precisions: List[str]) -> List[Step]:
    """Return the steps, the most valuable first.

    Args:
        tiny: whether to use small shapes, for a slow device.
        overrides: overrides of the command line.
        precisions: precisions that the device supports.
    """
    default_precision = "bf16" if "bf16" in precisions else "fp32"
    batch_sizes, bs_default = ((2, 4) if tiny else (4, 16, 32, 64, 128)), 4 if tiny else 32

    def train(name: str, *changes: str, bs: int = bs_default, limit_s: float = 150.0) -> Step:
        shape = _TINY if tiny else []
        given = [f"precision={default_precision}", f"bs={bs}", *_SEQUENCES, *shape, *_SHORT, *changes]
        return Step(name, "train", given, limit_s)

    debug = ["experiment=debug", "run.max_steps=10", "precision=fp32"]
    resumed = ["experiment=debug", "run.max_steps=20", "run.checkpoint_interval_steps=5"]
    steps = [
        Step("debug run", "train", debug),
        Step("debug run on the CPU", "cpu", debug),
        train(f"{default_precision}, shared_context"),
    ]
    steps += [train(f"bs {bs}", bs=bs) for bs in batch_sizes if bs != bs_default]
    steps += [
        Step("verify", "verify", ["verify.max_minutes=3"], 240.0),
        train("published", "scoring=published", bs=2 if tiny else 4),
        train("fp32, TF32 off", "precision=fp32", "precision.tf32=false"),
        train("fp32, TF32 on", "precision=fp32", "precision.tf32=true"),
        train("amp", "precision=amp"),
        train("fp16", "precision=fp16"),
        train("matmul attention", "model.attention=matmul"),
        train("activation checkpointing", "model.activation_checkpointing=true"),
        train("compile", "model.compile=true", limit_s=240.0),
        train("profile", "callbacks=profile"),
        train("evaluation", "run.evaluate=true"),
        Step("stopped and resumed", "resume", resumed),
        Step("conformance tests", "kit", [], 180.0),
    ]
    steps = [step for step in steps if step.name.split(",")[0] not in ("amp", "fp16") or step.name in precisions]
    for step in steps:
        step.arguments = [*step.arguments, *overrides] if step.command != "kit" else step.arguments
    return steps


class BringUp:
    """Runs the steps, and writes their logs and runs to a folder."""

    def __init__(self, folder: Path, overrides: List[str], hardware: Any, minutes: float) -> None:
        self.folder, self.overrides, self.hardware, self.minutes = folder, overrides, hardware, minutes
        self.end = time.monotonic() + 60.0 * minutes
        self.root = Path(__file__).resolve().parent.parent

    def run(self, step: Step) -> None:
        """Run a step within its time limit and the remaining time."""
        left = self.end - time.monotonic()
        if left < 5.0:
            return
        name = step.name.replace(" ", "_").replace(",", "")
        log, start = self.folder / "logs" / f"{name}.txt", time.monotonic()
        step.run_dir = self.folder / "runs" / name
        module, run_dir = step.command, [f"hydra.run.dir={step.run_dir}"]
        arguments = [*step.arguments, *run_dir]
        if step.command == "cpu":
            hardware_keys = ("hardware=", "hardware.")
            module, arguments = "train", ["hardware=cpu", *(a for a in arguments if not a.startswith(hardware_keys))]
        commands = [[sys.executable, "-m", f"lit_glm.{module}", *arguments]]
        if step.command == "kit":
            target = self._runtime_class()
            if target is None:
                step.status = "not run: hardware.runtime=simulated has no device"
                return
            missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
            if missing:
                step.status = f"not run: needs {' and '.join(missing)}; {sys.executable} -m pip install -e '.[test]'"
                return
            kit = str(self.root / "tests" / "hardware" / "conformance.py")
            commands = [[sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", kit, f"--runtime={target}"]]
        if step.command == "resume":
            train = [sys.executable, "-m", "lit_glm.train", *step.arguments]
            commands = [[*train, *run_dir], [*train, f"run.resume={step.run_dir}"]]
        with log.open("w", encoding="utf-8") as output:
            for number, command in enumerate(commands):
                output.write(f"$ {shlex.join(command)}\n")
                output.flush()
                limit = min(step.limit_s, self.end - time.monotonic())
                stop = step.command == "resume" and number == 0
                step.status = self._wait(command, output, max(5.0, limit), step.run_dir if stop else None)
        step.seconds = time.monotonic() - start
        step.lines = log.read_text(encoding="utf-8", errors="replace").splitlines()

    def _wait(self, command: List[str], output: Any, limit_s: float, stop_in: Optional[Path]) -> str:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=self.folder)
        start = time.monotonic()
        try:
            while process.poll() is None:
                if stop_in is not None and len(_losses_in(stop_in)) > 6:
                    process.send_signal(signal.SIGTERM)
                    stop_in = None
                if time.monotonic() - start > limit_s:
                    return f"terminated after its limit of {limit_s:.0f} s"
                time.sleep(0.05)
        finally:  # also when this program is stopped
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(timeout=15)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        return "ok" if process.returncode == 0 else f"exit status {process.returncode}"

    def _runtime_class(self) -> Optional[str]:
        if self.hardware.runtime == "simulated":
            return None
        if self.hardware._target_ is not None:
            return str(self.hardware._target_)
        from lit_glm.config.schema import TopologyConfig
        from lit_glm.hardware.runtimes.selection import make_runtime

        kind = type(make_runtime(self.hardware, TopologyConfig()))
        return f"{kind.__module__}.{kind.__qualname__}"

    def page(self, steps: List[Step]) -> str:
        """Return the content of bring_up.md."""
        environment = next((env for env in map(_environment, steps) if env), {})
        simulated = " (SIMULATED)" if self.hardware.runtime == "simulated" else ""
        lines = [
            f"# Bring-up: {' '.join(self.overrides) or 'hardware=cpu'}{simulated}",
            "",
            f"{time.strftime('%Y-%m-%d %H:%M')}, at most {self.minutes:g} minutes, `scripts/bring_up.sh`. Each figure "
            "was measured by the command of its row, listed below; logs and runs lie beside this page.",
            "",
        ]
        shown = ("device_name", "devices", "driver", "cpu", "cores", "os", "kernel", "python", "git_commit")
        lines += [f"- {key}: {environment[key]}" for key in shown if environment.get(key) not in (None, "")]
        packages = environment.get("packages") or {}
        lines += [f"- torch: {packages['torch']}"] if "torch" in packages else []
        head = ["step", "status", "samples/s (p_core)", "MFU", "memory GiB", "J per sample", "last loss", "seconds"]
        lines += ["", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        for step in steps:
            row, joules = step.result, step.result.get("samples_per_joule")
            cells = [
                step.name + (" (SIMULATED)" if row.get("simulated") else ""),
                step.status,
                _number(row.get("p_core"), "{:.1f}"),
                _number(row.get("mfu"), "{:.1%}"),
                _number(row.get("mem_actual_gib"), "{:.1f}"),
                _number(1.0 / joules if joules else None, "{:.3g}"),
                _last_loss(step),
                f"{step.seconds:.0f}" if step.seconds else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", *_compare_losses(steps), *_verify_lines(steps)]
        wrong = [step for step in steps if step.status != "ok"]
        lines += ["", "## Not finished", ""] if wrong else []
        for step in wrong:
            lines.append(f"- {step.name}: {step.status}")
            if step.status.startswith("exit status"):
                lines += [f"  - `{line[:200]}`" for line in step.lines if line.startswith("lit_glm: ")][-2:]
        lines += ["", "## Commands", ""]
        lines += [f"- {step.name}: `{line[2:]}`" for step in steps for line in step.lines if line.startswith("$ ")]
        return "\n".join(lines) + "\n"


def hardware_of(overrides: List[str]) -> Any:
    """Return the configuration of the device, as `train` composes it."""
    from lit_glm.config.command_line import CommandLine
    from lit_glm.config.hydra_main import load_config
    from lit_glm.config.schema import TrainConfig

    line = CommandLine.read(overrides)
    return load_config("train", ["experiment=debug", *line.overrides, *line.searchpath], TrainConfig).hardware


def _environment(step: Step) -> Dict[str, Any]:
    if step.command != "train" or step.run_dir is None:
        return {}
    try:
        content = json.loads((step.run_dir / "environment.json").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _number(value: Any, form: str) -> str:
    return form.format(value) if isinstance(value, (int, float)) else ""


def _losses(step: Step) -> List[float]:
    return [] if step.run_dir is None else _losses_in(step.run_dir)


def _losses_in(run_dir: Path) -> List[float]:
    try:
        rows = (run_dir / "steps.csv").read_text().splitlines()[1:]
        return [float(row.split(",")[3] or "nan") for row in rows]
    except (OSError, ValueError, IndexError):
        return []


def _last_loss(step: Step) -> str:
    losses = _losses(step)
    return f"{losses[-1]:.4f}" if losses else ""


def _first_not_finite(losses: List[float]) -> Optional[int]:
    return next((number for number, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)


def _compare_losses(steps: List[Step]) -> List[str]:
    """Compare the losses of the debug run with the CPU's."""
    losses = {step.name: _losses(step) for step in steps}
    device, cpu = losses.get("debug run", []), losses.get("debug run on the CPU", [])
    wrong = _first_not_finite(device)
    if wrong is not None:
        return [f"FAIL: the loss of the debug run (fp32) is not finite on the device from step {wrong} on."]
    if not device or len(device) != len(cpu):
        return ["The losses of the debug run could not be compared with the CPU's."]
    difference = max(abs(one - other) for one, other in zip(device, cpu))
    return [f"Losses of the debug run (fp32, {len(device)} steps): largest difference from the CPU's {difference:.2g}."]


def _verify_lines(steps: List[Step]) -> List[str]:
    for step in steps:
        if step.command == "verify" and step.lines:
            checks = [line for line in step.lines if line.startswith(("FAIL", "warn", "ok "))]
            fails = [line for line in checks if line.startswith(("FAIL", "warn"))]
            return [
                "",
                "## verify",
                "",
                f"{len(checks)} checks, {len(fails)} not ok.",
                *(f"- {line}" for line in fails),
            ]
    return []


def _with_absolute_path(override: str) -> str:
    """Make the path of an existing file in an override absolute: the steps run in another directory."""
    key, _, value = override.partition("=")
    is_path = key.endswith(("_file", "_dir", ".init_checkpoint"))
    return f"{key}='{Path(value).resolve()}'" if is_path and value and Path(value).exists() else override


def main() -> int:
    """Run all steps for which there is time; return 0 if those that ran succeeded."""
    parser = argparse.ArgumentParser("bring_up.sh", description="First tests of a new device in one command.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="hardware=NAME and other overrides of train")
    parser.add_argument("--minutes", type=float, default=30.0, help="for all steps together (default: 30)")
    parser.add_argument("--out", type=Path, help="folder (default: bring-up/DATE-TIME)")
    parser.add_argument("--config-dir", type=Path, help="folder with your own hardware/ files")
    given = parser.parse_intermixed_args()
    folder = (given.out or Path("bring-up") / time.strftime("%Y-%m-%d-%H-%M-%S")).resolve()
    if folder.exists() and any(folder.iterdir()):
        print(f"lit_glm: {folder}: is not empty; give another --out", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    overrides = [_with_absolute_path(override) for override in given.overrides]
    overrides += [f"--config-dir={given.config_dir.resolve()}"] if given.config_dir is not None else []
    fixed = [override for override in overrides if override.lstrip("+~").partition("=")[0] in _KEYS_OF_STEPS]
    if fixed:
        print(f"lit_glm: {', '.join(fixed)}: is set by the steps themselves; leave it out", file=sys.stderr)
        return 2
    tiny = any(word in ("hardware=cpu", "hardware.runtime=simulated") for word in overrides)
    try:
        hardware = hardware_of(overrides)
    except Exception as error:  # the message of train
        print(f"lit_glm: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    steps = plan_steps(tiny, overrides, list(hardware.precisions))
    bring_up = BringUp(folder, overrides, hardware, given.minutes)
    for step in steps:
        bring_up.run(step)
        rate = _number(step.result.get("p_core"), ", {:.1f} samples/s")
        print(f"lit_glm: {step.name}: {step.status}{rate}", flush=True)
        (folder / "bring_up.md").write_text(bring_up.page(steps), encoding="utf-8")
    runs = str(folder / "runs")
    report = [sys.executable, "-m", "lit_glm.report", runs, "--format", "md,csv,html", "--out", str(folder / "report")]
    subprocess.run(report, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    print(f"lit_glm: {folder}/bring_up.md")
    has_failed = any(step.status.startswith("exit status") for step in steps)
    return int(has_failed or _first_not_finite(_losses(steps[0])) is not None)


if __name__ == "__main__":
    sys.exit(main())
