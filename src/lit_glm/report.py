"""`python -m lit_glm.report RUN_DIR ...`: report the results of any number of runs in the published format."""

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Dict, List, Optional, Sequence

from lit_glm.config.key_aliases import old_key_message
from lit_glm.console import CommandParser, output_error, set_up_console
from lit_glm.errors import InputError
from lit_glm.launch.signals import run_interruptible
from lit_glm.metrics.registry import METRICS, OBJECTIVES

log = logging.getLogger("lit_glm.report")

if TYPE_CHECKING:
    from lit_glm.reporting.run_reader import ReportRun

FORMATS = ("md", "csv", "html")
LANGUAGES = ("en", "zh")
_OVERRIDABLE = ("machine", "device_name", "network", "driver", "image")


def _parse_choices(text: str, known: Sequence[str], option: str) -> List[str]:
    chosen = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [part for part in chosen if part not in known]
    if wrong or not chosen:
        raise InputError(f"{option} {text}: must be one or more of {','.join(known)}")
    return list(dict.fromkeys(chosen))


def _environment_overrides(places: List[str]) -> Dict[str, str]:
    """Remove the `report.KEY=VALUE` arguments from `places` and return them."""
    given = [place for place in places if place.startswith("report.") and "=" in place]
    environment = {}
    for argument in given:
        places.remove(argument)
        key, _, value = argument[len("report.") :].partition("=")
        renamed = old_key_message(f"report.{key}", value)
        if renamed is not None:
            raise InputError(renamed)
        if key not in _OVERRIDABLE:
            raise InputError(f"report.{key}: unknown key; the keys are report.{', report.'.join(_OVERRIDABLE)}")
        environment[key] = value
    return environment


def _compare(args: argparse.Namespace) -> int:
    """Compare two runs, in Markdown and English, on standard output or as compare.md in --out; return the status."""
    from lit_glm.reporting.comparison import compare_runs
    from lit_glm.reporting.run_reader import find_runs

    paths, limit = list(args.compare), args.max_loss_diff
    refused = [f"--format {args.format}"] if args.format != "md" else []
    refused += [f"--lang {args.lang}"] if args.lang != "en" else []
    refused += [f"a third run ({path})" for path in args.runs] + (["--check"] if args.check else [])
    refused += (["--best"] if args.best else []) + ([f"--sort {args.sort}"] if args.sort else [])
    if limit is not None and not limit >= 0:
        raise InputError(f"--max-loss-diff {limit:g}: must be at least 0")
    if refused:
        raise InputError(f"--compare takes two runs and writes Markdown in English; it does not take {refused[0]}")
    sides = []
    for path in paths:
        runs, trouble = find_runs([path])
        if len(runs) != 1:
            raise InputError("\n".join([f"--compare {path}: contains {len(runs)} runs, must be one", *trouble]))
        sides.append(runs[0])
    text, largest = compare_runs(*sides)
    if args.out is None:
        print(text, end="")
    else:
        _write_report(args.out / "compare.md", text, "## Configuration and environment")
    if limit is None:
        return 0
    if largest is None:
        log.warning(f"--max-loss-diff {limit:g}: no step in common, nothing was compared")
        return 1
    if largest > limit:
        log.warning(f"largest loss difference {largest:.3g} is above {limit:g}")
        return 1
    return 0


def report(args: argparse.Namespace) -> int:
    """Write the report that the arguments describe; return the exit status."""
    import datetime

    import lit_glm
    from lit_glm.reporting import formats
    from lit_glm.reporting.definitions import Translations
    from lit_glm.reporting.document import make_document
    from lit_glm.reporting.run_reader import find_runs

    places = list(args.runs)
    if args.sort is not None and args.sort not in OBJECTIVES:
        raise InputError(f"--sort {args.sort}: must be one of {', '.join(OBJECTIVES)}")
    if args.compare:
        return _compare(args)
    if args.max_loss_diff is not None:
        raise InputError(f"--max-loss-diff {args.max_loss_diff:g}: needs --compare A B")
    given = {"--out": args.out, "--check": args.check, "--format": args.format != "md", "--lang": args.lang != "en"}
    if args.best and any(given.values()):
        option = next(name for name, value in given.items() if value)
        raise InputError(f"--best prints one run in English; leave out {option}")
    kinds = _parse_choices(args.format, FORMATS, "--format")
    languages = _parse_choices(args.lang, LANGUAGES, "--lang")
    environment = _environment_overrides(places)
    if not places:
        raise InputError("no runs given: give run folders, sweep folders or patterns of them")
    if args.out is None and (len(kinds) > 1 or len(languages) > 1):
        raise InputError(f"--format {args.format} --lang {args.lang}: several files need --out DIR")
    runs, left_out = find_runs(places)
    for line in left_out:
        log.warning(line)
    if not runs:
        raise InputError("no run was found")
    key = args.sort or ("acc" if args.best else None)
    if args.best:
        print(_best_run_text(runs, str(key)))
        return 0
    now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
    missing: List[str] = []
    for language in languages:
        words = Translations(language)
        document = make_document(runs, left_out, environment, words, key)
        missing = missing or document.missing
        if args.check and args.out is None:
            break  # only the list is printed
        generated = words("generated", lit_glm.__version__, now, len(runs))
        for kind in kinds:
            if kind == "csv":
                text = formats.csv_text(document)
            else:
                text = (formats.html if kind == "html" else formats.markdown)(document, generated)
            text = text.encode("utf-8", "replace").decode("utf-8")  # file names may be invalid UTF-8
            if args.out is None:
                sys.stdout.write(text)
                continue
            path = args.out / f"report.{language}.{kind}"
            _write_report(path, text, "e2e_time,p_whole" if kind == "csv" else " lit_glm ")
    if args.check:
        words = Translations(languages[0])
        print("\n".join([f"{words('missing')}:", *missing] if missing else [words("nothing_missing")]))
    return 1 if args.check and missing else 0


def _write_report(path: Path, text: str, mark: str) -> None:
    """Write a file in --out, which may replace an earlier one, and print its path.

    Args:
        path: the file.
        text: its content.
        mark: text that every such file contains.

    Raises:
        InputError: if it cannot be written, or there is a file that `report` has not written.
    """
    from lit_glm.atomic_files import write_text

    text = text.encode("utf-8", "replace").decode("utf-8")  # file names may be invalid UTF-8
    try:
        if path.exists() and mark not in path.read_text(encoding="utf-8", errors="replace"):
            raise InputError(f"{path}: exists and was not written by report; give another --out")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise InputError(f"--out {path.parent}: cannot be written ({error})") from error
    print(path)


def _best_run_text(runs: "List[ReportRun]", key: str) -> str:
    """Return row, folder and command of the best complete run by a metric."""
    from lit_glm.reporting.document import run_command_line
    from lit_glm.runs.result import results_table

    known = [run for run in runs if run.complete and run.number(key) is not None]
    if not known:
        raise InputError(f"--sort {key}: no complete run has this metric")
    plain = [run for run in known if not run.result.get("simulated") and not run.result.get("profiled")]
    known = plain or known  # simulated and profiled runs count only if there are no others
    best = min(known, key=lambda run: METRICS[key].sort_key(run.number(key), run.result.get("converged")))
    command = run_command_line(best)
    lines = [
        results_table([best.result]),
        f"best of {len(known)} by {key} ({METRICS[key].form(best.number(key) or 0.0)}): {best.path}",
        f"scoring={best.result.get('scoring')}",
    ]
    return "\n".join([*lines, *([f"command: {command}"] if command else [])])


def main(arguments: Optional[List[str]] = None) -> int:
    """Parse the arguments and report; return the exit status."""
    parser = CommandParser(
        "lit_glm.report",
        "Report results of runs in the published format: environment, general information, result table.\n\n"
        "  python -m lit_glm.report outputs multirun --lang en,zh --format md,html --out result\n"
        "  python -m lit_glm.report --compare RUN_DIR RUN_DIR",
        epilog="report.machine=..., report.device_name=, report.network=, report.driver=,\nreport.image= provide "
        "information that cannot be detected.",
    )
    parser.add_argument("runs", nargs="*", metavar="RUN_DIR", help="run folders, sweep folders, patterns of them")
    parser.add_argument("--format", default="md", help="md, csv, html; several with commas (default: md)")
    parser.add_argument("--lang", default="en", help="en, zh; several with commas (default: en)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write report.LANG.FORMAT there instead of to standard output"
    )
    parser.add_argument(
        "--check", action="store_true", help="list what is missing for a complete document; exit with 1 if anything is"
    )
    parser.add_argument("--best", action="store_true", help="print only the best run, by --sort (default: acc)")
    parser.add_argument("--sort", metavar="KEY", help="sort rows by a metric, best first; a wrong name lists all")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="compare two runs side by side instead")
    parser.add_argument("--max-loss-diff", type=float, help="with --compare: exit with 1 above it")
    args = parser.parse_intermixed_args(arguments)
    set_up_console()

    def write() -> int:
        status, problem = report(args), output_error()
        if problem is not None and args.out is None:
            raise InputError(f"the report cannot be written to standard output ({problem}); give --out DIR")
        return status

    return run_interruptible(write)


if __name__ == "__main__":
    sys.exit(main())
