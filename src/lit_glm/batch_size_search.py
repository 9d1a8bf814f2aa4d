"""The search of `tune`: short runs, one batch size after the other.

The next batch size is a function of the trials so far, so that an interrupted search can be resumed. A trial is a job
like those of a sweep, in a folder of its own. tune.json is written before and after each trial; other nodes read there
which trial node 0 starts.
"""

import datetime
import logging
import statistics
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch

import lit_glm
from lit_glm.atomic_files import write_json, write_text
from lit_glm.config.schema import TrainConfig, train_config
from lit_glm.config.tuned_values import TRIALS_FOLDER, TUNE_FILE, read_search, search_key, searches
from lit_glm.errors import InputError, RunError
from lit_glm.hardware.runtimes.selection import check_runtime_available, make_runtime
from lit_glm.launch.launcher import run_job
from lit_glm.launch.rendezvous import RendezvousError, this_node
from lit_glm.launch.signals import Interrupted
from lit_glm.launch.supervisor import TimeLimitExceeded
from lit_glm.metrics.memory_estimate import check_memory, estimate_memory
from lit_glm.planning.prediction import saves_attention_probs
from lit_glm.planning.workload import Workload, load_examples
from lit_glm.reporting.plots import plot_trials
from lit_glm.runs.job_spec import JobSpec, config_hash
from lit_glm.runs.result import is_complete, markdown_table, read_result
from lit_glm.runs.run_folder import lock_directory
from lit_glm.runs.run_writer import STEP_COLUMNS, read_csv_rows

log = logging.getLogger(__name__)

_WARM_UP_STEPS = 3
"""Steps that are not timed: they touch memory and start kernels, and the first one has the longest examples."""
_POLL_S = 0.2

FITS, MEMORY, NOT_TRIED, OUT_OF_TIME = "fits", "out of memory", "not tried", "no time"


@dataclass
class Trial:
    """One short run with a batch size."""

    bs: int
    status: str
    p_core: Optional[float] = None
    """Samples per second, for examples of average length."""
    mfu: Optional[float] = None
    memory_gib: Optional[float] = None
    samples_per_joule: Optional[float] = None
    message: str = ""
    """Why it does not fit."""

    def describe(self) -> str:
        """Return the trial as a line of the log."""
        if self.status != FITS:
            return f"bs={self.bs}: {self.status} ({self.message[:160]})"
        memory = "" if self.memory_gib is None else f", {self.memory_gib:.2f} GiB"
        return f"bs={self.bs}: {self.p_core or 0.0:.4g} samples/s{memory}"


def _trials_of(search: Dict[str, Any]) -> List[Trial]:
    """Return the trials of a tune.json, without those that exceeded the time limit, which a resumed search repeats."""
    names = {field.name for field in fields(Trial)}
    trials = [Trial(**{name: entry[name] for name in names & set(entry)}) for entry in search.get("trials", [])]
    return [trial for trial in trials if trial.status != OUT_OF_TIME]


def rates_by_bs(trials: List[Trial]) -> Dict[int, List[float]]:
    """Return p_core of the trials by ascending batch size, without sizes that did not fit in at least one trial."""
    rates: Dict[int, List[float]] = {}
    too_large = {trial.bs for trial in trials if trial.status in (MEMORY, NOT_TRIED)}
    for trial in sorted(trials, key=lambda trial: trial.bs):
        if trial.status == FITS and trial.p_core is not None and trial.bs not in too_large:
            rates.setdefault(trial.bs, []).append(trial.p_core)
    return rates


def ranking(trials: List[Trial]) -> List[int]:
    """Return the batch sizes that fit, fastest first: by the median, the smaller one of equals."""
    rates = rates_by_bs(trials)
    return sorted(rates, key=lambda bs: (-statistics.median(rates[bs]), bs))


def next_bs(trials: List[Trial], max_bs: int, repeats: int) -> Optional[int]:
    """Return the batch size to try next, at most `max_bs`, and `repeats` times each; None if the search is complete."""
    rates = rates_by_bs(trials)
    low = max(rates, default=0)
    high = min((trial.bs for trial in trials if trial.status in (MEMORY, NOT_TRIED)), default=max_bs + 1)
    if high > max_bs and low < max_bs:
        return max(1, min(2 * low, max_bs))  # double until one does not fit
    if low == 0:
        return None
    if high - low > max(1, low // 16):
        return (low + high) // 2
    # Between the fastest and a neighbour that is more than a quarter away.
    fastest, known = ranking(trials)[:2], list(rates)
    best = known.index(fastest[0])
    for left in (best, best - 1):
        if 0 <= left < len(known) - 1 and known[left + 1] - known[left] > max(1, known[left] // 4):
            return (known[left] + known[left + 1]) // 2
    # The two fastest: each at least twice, then while their ranges overlap.
    fewer = min(fastest, key=lambda bs: len(rates[bs]))
    if len(rates[fewer]) >= min(2, repeats) and min(rates[fastest[0]]) > max(rates[fastest[-1]]):
        return None
    if len(fastest) == 1 and len(rates[fewer]) >= 2:
        return None
    return fewer if len(rates[fewer]) < repeats else None


class Search:
    """A search in its folder: tune.json around every trial; at the end a table, a figure and a fix_hp file."""

    def __init__(self, config: Any, folder: Path, command: List[str]) -> None:
        """Open the folder and load earlier trials of the same search.

        Args:
            config: configuration of the runs, with the options of `tune`; its bs is ignored.
            folder: folder of a new search.
            command: the command line, for the records of the trials.

        Raises:
            InputError: if the folder contains something else, or no search to resume.
        """
        self.config, self._command, self._start = config, command, time.time_ns()
        self._hash = config_hash(train_config(config, bs=1, eval_bs=1))
        self.node = this_node(config.topology, config.hardware.runtime == "simulated")
        resume = config.run.resume
        if resume == "auto":
            same = [(path, search) for path, search in searches() if search.get("config_hash") == self._hash]
            unfinished = [path for path, search in same if not search["complete"]]
            if not unfinished:
                log.info("run.resume=auto: no unfinished search of this configuration; starting a new one")
            folder = next(iter(unfinished), folder)
        elif resume is not None:
            folder = Path(resume)
        before, self.folder = read_search(folder), folder.resolve()
        if resume not in (None, "auto") and not before:
            raise InputError(f"run.resume={resume}: is not a search folder (no {TUNE_FILE})")
        if before and before.get("config_hash") != self._hash:
            raise InputError(f"{self.folder}: contains a search of another configuration; give another hydra.run.dir=")
        if not before and self.node.rank == 0 and self.folder.is_dir() and any(self.folder.iterdir()):
            raise InputError(f"{self.folder}: contains files that are not a search; give another hydra.run.dir=")
        self.trials = _trials_of(before)
        self.seconds = float(before.get("seconds", 0.0))
        """Seconds spent so far, including interrupted parts."""
        self.examples = load_examples(config)[0]
        if len(self.examples) < config.topology.world_size:
            few = f"{len(self.examples)} training examples"
            raise InputError(f"{few}: a step of topology={config.topology.name} needs {config.topology.world_size}")

    def _next_bs(self) -> Optional[int]:
        max_bs = len(self.examples) // self.config.topology.world_size
        return next_bs(self.trials, max_bs, self.config.tune.repeats)

    def run_coordinator(self) -> int:
        """Search on node 0 until the result is known or the time is over; return the exit status."""
        minutes, status = self.config.tune.max_minutes, 0
        limit_s = self.seconds + 60.0 * minutes
        log.info(f"search folder {self.folder}")
        if self.trials:
            log.info(f"resuming after {len(self.trials)} trials")
        self._write()  # marks the folder as this search's
        try:
            while (bs := self._next_bs()) is not None and self.seconds < limit_s:
                self.trials.append(self._run_trial(bs, limit_s - self.seconds))
                log.info(self.trials[-1].describe())
                if self.trials[-1].status == OUT_OF_TIME:
                    break
        except Interrupted as stop:
            log.error(f"{stop}; resume with run.resume={self.folder}")
            status = stop.exit_status
        finally:
            complete = self._next_bs() is None
            self._write(complete)  # without a next trial: the other nodes end
        if not complete and not status:
            over = f"tune.max_minutes={minutes:g} is over: results so far"
            log.info(f"{over}; for as many minutes more, use the same command with run.resume={self.folder}")
        print(self._conclude(complete), flush=True)
        return status or int(not ranking(self.trials))

    def run_follower(self) -> int:
        """Run this node's part of each trial that node 0 starts; return the exit status.

        Raises:
            RunError: if node 0 starts no trial in time.
        """
        patience_s, done = self.config.run.stall_timeout_s, None
        log.info(f"waiting for node 0 to start a trial in {self.folder}")
        end = time.monotonic() + patience_s
        while time.monotonic() < end:
            search = read_search(self.folder)
            trial = search.get("next")
            if trial is None and done is None:
                self.trials = _trials_of(search)
            if trial is None and (done is not None or (search.get("complete") and self._next_bs() is None)):
                return 0
            if trial is None or trial == done:
                time.sleep(_POLL_S)
                continue
            done = trial
            try:
                self._run(int(trial["bs"]), self.folder / TRIALS_FOLDER / str(trial["folder"]))
            except RendezvousError:
                done = None  # node 0 may have been late
            except (InputError, RunError) as error:
                log.info(f"bs={trial['bs']}: {error}")  # node 0 decides what it means
            end = time.monotonic() + patience_s
        raise RunError(f"node 0 started no trial for {patience_s:.0f} s in {self.folder}: do all nodes share it?")

    def _trial_config(self, bs: int) -> TrainConfig:
        """Return the configuration of a short run: longest examples first, no evaluation, checkpoint or logger."""
        steps, config = _WARM_UP_STEPS + self.config.tune.steps, self.config
        run = replace(config.run, max_steps=steps, max_samples=10**12, evaluate=False, resume=None, overwrite=True)
        run.checkpoint_interval_steps = None
        model, data = replace(config.model, init_checkpoint=None), replace(config.data, longest_first=True)
        return train_config(config, bs=bs, run=run, model=model, data=data, logger={}, callbacks={})

    def _run(self, bs: int, trial_dir: Path, limit_s: Optional[float] = None) -> None:
        """Run this node's part of a trial; its output goes to a file next to its folder."""
        trial_dir.parent.mkdir(parents=True, exist_ok=True)
        job = JobSpec(self._trial_config(bs), time.monotonic(), self._command, is_trial=True)
        output = trial_dir.with_suffix(".txt" if self.node.rank == 0 else f".node{self.node.rank}.txt")
        run_job(job, trial_dir, {}, self.node, in_process=False, output=output, limit_s=limit_s)

    def _run_trial(self, bs: int, seconds: float) -> Trial:
        """Run a trial; a lack of memory or time is an outcome, any other failure is raised.

        p_core follows from the FLOPs of the timed steps, so that their lengths do not bias it.
        """
        work, start = Workload(self._trial_config(bs), self.examples, None), time.monotonic()
        message = self._exceeds_memory(work, bs)
        if message:
            return Trial(bs, NOT_TRIED, message=message)
        trial_dir = self.folder / TRIALS_FOLDER / f"bs{bs}_{sum(trial.bs == bs for trial in self.trials)}"
        self._write(next_trial={"bs": bs, "folder": trial_dir.name, "start": self._start})
        try:
            self._run(bs, trial_dir, seconds)
        except RunError as error:
            reason = str((read_result(trial_dir) or {}).get("error") or error)
            if "out of memory" in reason or "was killed by SIGKILL" in reason:
                return Trial(bs, MEMORY, message=reason)
            if not isinstance(error, TimeLimitExceeded):
                raise RunError(f"bs={bs}: {reason} (full output: {trial_dir.with_suffix('.txt')})") from error
            if not is_complete(trial_dir):  # a complete one reached the limit while its processes exited
                return Trial(bs, OUT_OF_TIME, message=f"exceeded the remaining {seconds:.0f} s")
        finally:
            self.seconds += time.monotonic() - start
        result, rows = read_result(trial_dir) or {}, read_csv_rows(trial_dir / "steps.csv", STEP_COLUMNS)
        rows = rows[_WARM_UP_STEPS:]
        flops = sum(float(work.counter.flops_by_rank(int(row["step"])).mean()) for row in rows)
        compute_s = sum(float(row["compute_s"]) for row in rows)
        p_core = flops / (work.mean_rank_flops / bs) / compute_s * work.ranks if compute_s else None
        mfu, memory, efficiency = map(result.get, ("mfu", "mem_actual_gib", "samples_per_joule"))
        return Trial(bs, FITS, p_core, mfu, memory, efficiency)

    def _exceeds_memory(self, work: Workload, bs: int) -> str:
        """Return why a batch size is not tried: if its estimate far exceeds the memory, it could crash the machine."""
        hardware = self.config.hardware
        if hardware.accelerator != "cpu" and hardware.runtime != "simulated":
            return ""  # a driver opened by this process would interfere with the trials
        check = check_memory(self._trial_config(bs), work.lengths, make_runtime(hardware, self.config.topology))
        estimate, available = check.estimate.total, check.available_bytes
        if check.host_message or available is None or estimate <= 1.1 * available:
            return check.host_message
        return f"estimated at {estimate / 2**30:.1f} of {available / 2**30:.1f} GiB"

    def _write(self, complete: bool = False, next_trial: Optional[Dict[str, Any]] = None) -> None:
        content = {
            **search_key(self.config),
            "config_hash": self._hash,
            "complete": complete,
            "seconds": self.seconds,
            "largest_bs": max(rates_by_bs(self.trials), default=None),
            "fastest_bs": next(iter(ranking(self.trials)), None),
            "next": next_trial,
            "trials": [asdict(trial) for trial in self.trials],
        }
        write_json(self.folder / TUNE_FILE, content)

    def _table(self, complete: bool) -> str:
        """Format one row per batch size as a Markdown table: fastest first, those that do not fit last."""

        def text(value: Optional[float], form: str) -> str:
            return "" if value is None else format(value, form)

        rates, order = rates_by_bs(self.trials), ranking(self.trials)
        names = ("fastest", "largest that fits") if complete else ("fastest so far", "largest tried")
        columns = "bs|p_core|[lowest, highest]|trials|mfu|memory GiB|estimated GiB without base|samples/J|"
        rows = [columns.split("|")]
        for bs in order:
            values, last = rates[bs], [trial for trial in self.trials if trial.bs == bs][-1]
            lengths = Workload(self._trial_config(bs), self.examples, None).lengths
            estimate = estimate_memory(self.config, lengths, 0.0, saves_attention_probs(self.config), bs).total / 2**30
            marks = ", ".join(name for name, is_so in zip(names, (bs == order[0], bs == max(order))) if is_so)
            spread = f"[{min(values):.4g}, {max(values):.4g}]" if len(values) > 1 else ""
            row = [str(bs), f"{statistics.median(values):.4g}", spread, str(len(values)), text(last.mfu, ".3g")]
            row += [text(last.memory_gib, ".2f"), f"{estimate:.2f}", text(last.samples_per_joule, ".3g"), marks]
            rows.append(row)
        statuses = {trial.bs: trial.status for trial in self.trials if trial.bs not in rates}
        return markdown_table([*rows, *([str(bs), *[""] * 7, status] for bs, status in sorted(statuses.items()))])

    def _conclude(self, complete: bool) -> str:
        """Write tune.md, tune.svg and the fix_hp file; return the summary."""
        config, pair = self.config, f"{self.config.hardware.name}_{self.config.topology.name}"
        order, table, figure = ranking(self.trials), self._table(complete), ""
        lines = [table, ""]
        is_simulated = config.hardware.runtime == "simulated"
        lines += ["SIMULATED: computed on the CPU, not measured on the device"] if is_simulated else []
        if not complete:
            lines.append("INCOMPLETE: the search ended early; larger or faster values may exist")
        if not order and any(trial.status in (MEMORY, NOT_TRIED) for trial in self.trials):
            lines.append("no batch size fits: use a smaller model, activation checkpointing, or more memory")
        elif order:
            fits, fastest = ("that fits", "fastest") if complete else ("tried", "fastest so far")
            conclusion = f"largest bs {fits}: {max(order)}; {fastest}: {order[0]}"
            lines += [
                conclusion,
                f"bs=auto uses the fastest bs found below outputs/tune/; to keep it, copy {self.folder / pair}.yaml",
                "to the folder fix_hp/ of your own configuration (--config-dir)",
            ]
            about = f"{config.precision.name}, scoring={config.scoring.name}, model={config.model.name}"
            about += ", SIMULATED" * is_simulated
            versions = f"lit_glm {lit_glm.__version__}, torch {torch.__version__}, {datetime.date.today()}"
            source = f"Found by `python -m lit_glm.tune` for {pair}: {about}; {versions}."
            conclusion = conclusion if complete else f"INCOMPLETE search (complete: false): {conclusion}"
            comments = "".join(f"# {line}\n" for line in (source, conclusion, *table.splitlines()))
            values = f"fix_hp_source: {pair}\nbs: {order[0]}\neval_bs: {order[0]}\n"
            write_text(self.folder / f"{pair}.yaml", f"# @package _global_\n{comments}{values}")
            title = f"{config.hardware.name} {config.topology.name} {config.precision.name} {config.scoring.name}"
            too_large = {trial.bs for trial in self.trials if trial.status in (MEMORY, NOT_TRIED)} - set(order)
            write_text(self.folder / "tune.svg", plot_trials(rates_by_bs(self.trials), too_large, title))
            figure = "\n\n![samples per second by bs](tune.svg)"
        write_text(self.folder / "tune.md", "\n".join(lines) + figure + "\n")
        return "\n".join(lines)


def run_search(config: Any, folder: Path, command: List[str]) -> int:
    """Run a search, or this node's part of it; return the exit status."""
    check_runtime_available(config.hardware, config.topology)
    search = Search(config, folder, command)
    if search.node.rank > 0:
        return search.run_follower()
    with lock_directory(search.folder):
        return search.run_coordinator()
