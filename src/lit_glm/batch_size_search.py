"""The search of `tune`: short runs, one batch size after the other, each a job like those of a sweep.

The next batch size is a function of the trials so far, so that an interrupted search can be resumed. tune.json is
written before and after each trial; other nodes read there which trial node 0 starts.
"""

import datetime
import logging
import statistics
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Set

import torch

import lit_glm
from lit_glm.atomic_files import read_csv_rows, write_json, write_text
from lit_glm.config.schema import TrainConfig, train_config
from lit_glm.config.tuned_values import TRIALS_FOLDER, TUNE_FILE, read_search, search_key, searches
from lit_glm.data.memmap_dataset import SequenceLengths
from lit_glm.errors import InputError, RunError
from lit_glm.hardware.runtimes.selection import check_runtime_available, make_runtime
from lit_glm.launch.launcher import run_job
from lit_glm.launch.rendezvous import RendezvousError, resolve_node
from lit_glm.launch.signals import Interrupted
from lit_glm.launch.supervisor import TimeLimitExceeded
from lit_glm.metrics.memory_estimate import check_memory, estimate_memory
from lit_glm.planning.prediction import saves_attention_probs
from lit_glm.planning.workload import Workload, load_examples
from lit_glm.reporting.plots import plot_trials
from lit_glm.runs.job_spec import JobSpec, config_hash
from lit_glm.runs.result import is_complete, markdown_table, read_result
from lit_glm.runs.run_folder import lock_directory
from lit_glm.runs.run_writer import STEP_COLUMNS

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
    entries = [{name: entry[name] for name in names & set(entry)} for entry in search.get("trials", [])]
    return [Trial(**entry) for entry in entries if entry.get("status", OUT_OF_TIME) != OUT_OF_TIME and "bs" in entry]


def too_large(trials: List[Trial]) -> Set[int]:
    """Return the batch sizes that did not fit in at least one trial."""
    return {trial.bs for trial in trials if trial.status in (MEMORY, NOT_TRIED)}


def rates_by_bs(trials: List[Trial]) -> Dict[int, List[float]]:
    """Return p_core of the trials by ascending batch size, without sizes that are too large."""
    rates: Dict[int, List[float]] = {}
    excluded = too_large(trials)
    for trial in sorted(trials, key=lambda trial: trial.bs):
        if trial.p_core is not None and trial.bs not in excluded:
            rates.setdefault(trial.bs, []).append(trial.p_core)
    return rates


def ranking(trials: List[Trial]) -> List[int]:
    """Return the batch sizes that fit, fastest first: by the median, the smaller one of equals."""
    rates = rates_by_bs(trials)
    return sorted(rates, key=lambda bs: (-statistics.median(rates[bs]), bs))


def next_bs(trials: List[Trial], max_bs: int, repeats: int) -> Optional[int]:
    """Return the batch size to try next, at most `max_bs`, and `repeats` times each; None if the search is complete."""
    rates = rates_by_bs(trials)
    low, high = max(rates, default=0), min(too_large(trials), default=max_bs + 1)
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
            middle = (known[left] + known[left + 1]) // 2
            if middle not in too_large(trials):  # it may not fit although a larger one has
                return middle
    # The two fastest: each at least twice, then while their ranges overlap.
    fewer = min(fastest, key=lambda bs: len(rates[bs]))
    differ = len(fastest) == 1 or min(rates[fastest[0]]) > max(rates[fastest[1]])
    return fewer if len(rates[fewer]) < (min(2, repeats) if differ else repeats) else None


class Search:
    """A search in its folder: tune.json around every trial; at the end a table, a figure and a fix_hp file."""

    def __init__(self, config: Any, folder: Path, command: List[str]) -> None:
        """Open the folder of a new search, or that of `run.resume` with its trials; the bs of `config` is ignored.

        Raises:
            InputError: if the folder contains something else, or no search to resume.
        """
        check_runtime_available(config.hardware, config.topology)
        self.config, self._command, resume = config, command, config.run.resume
        self._hash = config_hash(train_config(config, bs=1, eval_bs=1))
        self.node = resolve_node(config.topology, config.hardware.runtime == "simulated")
        if resume == "auto":
            same = [(path, search) for path, search in searches() if search.get("config_hash") == self._hash]
            folder = next((path for path, search in same if not search["complete"]), folder)
        elif resume is not None:
            folder = Path(resume)
        before, self.folder = read_search(folder), folder.resolve()
        if resume == "auto" and not before:
            log.info("run.resume=auto: no unfinished search of this configuration; starting a new one")
        elif resume is not None and not before:
            raise InputError(f"run.resume={resume}: is not a search folder (no {TUNE_FILE})")
        if before and before.get("config_hash") != self._hash:
            raise InputError(f"{self.folder}: contains a search of another configuration; give another hydra.run.dir=")
        if not before and self.node.rank == 0 and self.folder.is_dir() and any(self.folder.iterdir()):
            raise InputError(f"{self.folder}: contains files that are not a search; give another hydra.run.dir=")
        self.trials, self.seconds = _trials_of(before), float(before.get("seconds", 0.0))  # of all parts
        self.examples, ranks = load_examples(config)[0], config.topology.world_size
        if len(self.examples) < ranks:
            few = f"{len(self.examples)} training examples"
            raise InputError(f"{few}: a step of topology={config.topology.name} needs {ranks}")

    def run(self) -> int:
        """Run the search, or this node's part of it; return the exit status."""
        if self.node.rank > 0:
            return self.run_follower()
        with lock_directory(self.folder):
            return self.run_coordinator()

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
        """Run this node's part of each trial that node 0 starts in time; return the exit status."""
        patience_s, done = self.config.run.stall_timeout_s, None
        log.info(f"waiting for node 0 to start a trial in {self.folder}")
        end = time.monotonic() + patience_s
        while time.monotonic() < end:
            search = read_search(self.folder)
            self.trials, trial = _trials_of(search), search.get("next")
            if trial is None and (done is not None or (search.get("complete") and self._next_bs() is None)):
                return 0
            if trial in (None, done):
                time.sleep(_POLL_S)
                continue
            done = trial
            try:
                self._run(self._trial_config(trial["bs"]), self.folder / TRIALS_FOLDER / trial["folder"])
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

    def _run(self, config: TrainConfig, trial_dir: Path, limit_s: Optional[float] = None) -> None:
        """Run this node's part of a trial; its output goes to a file next to its folder."""
        trial_dir.parent.mkdir(parents=True, exist_ok=True)
        job = JobSpec(config, time.monotonic(), self._command, is_trial=True)
        output = trial_dir.with_suffix(".txt" if self.node.rank == 0 else f".node{self.node.rank}.txt")
        run_job(job, trial_dir, {}, self.node, in_process=False, output=output, limit_s=limit_s)

    def _run_trial(self, bs: int, seconds: float) -> Trial:
        """Run a trial; a lack of memory or time is an outcome, any other failure is raised."""
        config, start = self._trial_config(bs), time.monotonic()
        work = Workload(config, self.examples, None)
        message = _exceeds_memory(config, work.lengths)
        if message:
            return Trial(bs, NOT_TRIED, message=message)
        trial_dir = self.folder / TRIALS_FOLDER / f"bs{bs}_{sum(trial.bs == bs for trial in self.trials)}"
        self._write(next_trial={"bs": bs, "folder": trial_dir.name, "start": time.time_ns()})
        try:
            self._run(config, trial_dir, seconds)
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
        result = read_result(trial_dir) or {}
        rows = read_csv_rows(trial_dir / "steps.csv", STEP_COLUMNS)[_WARM_UP_STEPS:]
        flops = sum(float(work.counter.flops_by_rank(int(row["step"])).mean()) for row in rows)
        compute_s = sum(float(row["compute_s"]) for row in rows)
        # From the FLOPs of the timed steps, so that their lengths do not bias it.
        p_core = flops / (work.mean_rank_flops / bs) / compute_s * work.ranks if compute_s else None
        mfu, memory, efficiency = map(result.get, ("mfu", "mem_actual_gib", "samples_per_joule"))
        return Trial(bs, FITS, p_core, mfu, memory, efficiency)

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

    def _table(self, fastest: str, largest: str) -> str:
        """Format one row per batch size as a Markdown table: fastest first, those that do not fit last."""
        rates, order = rates_by_bs(self.trials), ranking(self.trials)
        last, lengths = {trial.bs: trial for trial in self.trials}, SequenceLengths.from_dataset(self.examples)
        rows = ["bs|p_core|[lowest, highest]|trials|mfu|memory GiB|estimated GiB without base|samples/J|".split("|")]
        for bs in order:
            values, trial = rates[bs], last[bs]
            estimate = estimate_memory(self.config, lengths, 0.0, saves_attention_probs(self.config), bs).total / 2**30
            marks = ", ".join([fastest] * (bs == order[0]) + [largest] * (bs == max(order)))
            spread = f"[{min(values):.4g}, {max(values):.4g}]" if len(values) > 1 else ""
            numbers = (trial.mfu, ".3g"), (trial.memory_gib, ".2f"), (estimate, ".2f"), (trial.samples_per_joule, ".3g")
            texts = ["" if number is None else format(number, form) for number, form in numbers]
            rows.append([str(bs), f"{statistics.median(values):.4g}", spread, str(len(values)), *texts, marks])
        rows += [[str(bs), *[""] * 7, trial.status] for bs, trial in sorted(last.items()) if bs not in rates]
        return markdown_table(rows)

    def _conclude(self, complete: bool) -> str:
        """Write tune.md, tune.svg and the fix_hp file; return the summary."""
        config, order, figure = self.config, ranking(self.trials), ""
        fastest, fits = ("fastest", "that fits") if complete else ("fastest so far", "tried")
        table, simulated = self._table(fastest, f"largest {fits}"), config.hardware.runtime == "simulated"
        lines = [table, ""]
        lines += ["SIMULATED: computed on the CPU, not measured on the device"] if simulated else []
        lines += [] if complete else ["INCOMPLETE: the search ended early; larger or faster values may exist"]
        if order:
            pair = f"{config.hardware.name}_{config.topology.name}"
            conclusion = f"largest bs {fits}: {max(order)}; {fastest}: {order[0]}"
            if max(order) == len(self.examples) // config.topology.world_size:
                conclusion += "; the training data allow no larger one"
            lines += [
                conclusion,
                f"bs=auto uses the fastest bs found below outputs/tune/; to keep it, copy {self.folder / pair}.yaml",
                "to the folder fix_hp/ of your own configuration (--config-dir)",
            ]
            about = f"{config.precision.name}, scoring={config.scoring.name}, model={config.model.name}"
            about += ", SIMULATED" if simulated else ""
            versions = f"lit_glm {lit_glm.__version__}, torch {torch.__version__}, {datetime.date.today()}"
            source = f"Found by `python -m lit_glm.tune` for {pair}: {about}; {versions}."
            conclusion = conclusion if complete else f"INCOMPLETE search (complete: false): {conclusion}"
            comments = "".join(f"# {line}\n" for line in (source, conclusion, *table.splitlines()))
            values = f"fix_hp_source: {pair}\nbs: {order[0]}\neval_bs: {order[0]}\n"
            write_text(self.folder / f"{pair}.yaml", f"# @package _global_\n{comments}{values}")
            title = f"{config.hardware.name} {config.topology.name} {config.precision.name} {config.scoring.name}"
            write_text(self.folder / "tune.svg", plot_trials(rates_by_bs(self.trials), too_large(self.trials), title))
            figure = "\n\n![samples per second by bs](tune.svg)"
        elif too_large(self.trials):
            lines.append("no batch size fits: use a smaller model, activation checkpointing, or more memory")
        write_text(self.folder / "tune.md", "\n".join(lines) + figure + "\n")
        return "\n".join(lines)


def _exceeds_memory(config: TrainConfig, lengths: SequenceLengths) -> str:
    """Return why a batch size is not tried: if its estimate far exceeds the memory, it could crash the machine."""
    if config.hardware.accelerator != "cpu" and config.hardware.runtime != "simulated":
        return ""  # a driver opened by this process would interfere with the trials
    check = check_memory(config, lengths, make_runtime(config.hardware, config.topology))
    estimate, available = check.estimate.total, check.available_bytes
    if check.host_message or available is None or estimate <= 1.1 * available:
        return check.host_message
    return f"estimated at {estimate / 2**30:.1f} of {available / 2**30:.1f} GiB"
