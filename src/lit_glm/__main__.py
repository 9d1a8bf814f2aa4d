"""`lit-glm COMMAND ...` and `python -m lit_glm COMMAND ...`, equivalent to `python -m lit_glm.COMMAND ...`."""

import importlib
import sys

import lit_glm

_COMMANDS = {
    "train": "one benchmark run, or with -m a sweep",
    "prepare": "raw ReCoRD to the HDF5 files that train reads",
    "evaluate": "score a checkpoint: EM, F1, predictions",
    "export": "the fine-tuned weights of a run as a file",
    "report": "results of any number of runs as the published document, with plots",
    "doctor": "pre-flight checks before a long run",
    "verify": "numerical and timing acceptance test of a device",
    "plan": "predict memory, time, throughput and energy of a run",
    "tune": "find the largest and the fastest batch size of a device and topology",
}


def main() -> int:
    """Run the command that the first argument names; return its exit status."""
    if sys.argv[1:2] == ["--version"]:
        print(f"lit-glm {lit_glm.__version__}")
        return 0
    if len(sys.argv) < 2 or sys.argv[1] not in _COMMANDS:
        asked = len(sys.argv) > 1 and sys.argv[1] not in ("-h", "--help")
        if asked:
            print(f"lit_glm: {sys.argv[1]}: there is no such command", file=sys.stderr)
        print("\n".join(f"  lit-glm {name:9} {text}" for name, text in _COMMANDS.items()))
        return 2 if asked else 0
    command = sys.argv.pop(1)
    sys.argv[0] = f"lit-glm {command}"
    status: int = importlib.import_module(f"lit_glm.{command}").main()
    if command == "train":
        importlib.import_module("lit_glm.launch.signals").ignore_stop_signals()
    return status


if __name__ == "__main__":
    sys.exit(main())
