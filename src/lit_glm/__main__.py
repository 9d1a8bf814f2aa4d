"""`lit-glm COMMAND ...` and `python -m lit_glm COMMAND ...`, equivalent to `python -m lit_glm.COMMAND ...`."""

import importlib
import logging
import os
import sys

import lit_glm
from lit_glm.console import install_message_handler

log = logging.getLogger("lit_glm")

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


_COMPLETION = """\
_lit_glm_complete() {
  COMPREPLY=($(compgen -W "$("${COMP_WORDS[0]}" -sc query=bash 2>/dev/null)" -- "${COMP_WORDS[COMP_CWORD]}"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _lit_glm_complete lit-glm
"""
"""For bash, and for zsh after `autoload -U bashcompinit && bashcompinit`. Hydra's own completes `lit-glm` without the
command behind it."""


def complete(request: str) -> int:
    """Answer `lit-glm -sc install=bash|query=bash`: the shell script, or completions of $COMP_LINE."""
    if request != "query=bash":
        print(_COMPLETION, end="")
        return 0
    line = os.environ.get("COMP_LINE", "")[: int(os.environ.get("COMP_POINT", "0")) or None]
    words = line.split()
    if len(words) < 2 or (len(words) == 2 and not line.endswith(" ")):
        print(" ".join(f"{name} " for name in _COMMANDS))
        return 0
    if words[1] not in _COMMANDS or words[1] in ("export", "report"):  # no Hydra commands: files
        return 0
    # Hydra strips the name of the program, which is the command here.
    os.environ["COMP_LINE"] = line[line.index(words[1], len(words[0])) :]
    os.environ["COMP_POINT"] = str(len(os.environ["COMP_LINE"]))
    sys.argv = [words[1], "-sc", request]
    return importlib.import_module(f"lit_glm.{words[1]}").main()


def main() -> int:
    """Run the command that the first argument names; return its exit status."""
    lit_glm.exit_on_interrupt()
    if "-sc" in sys.argv[1:3] and sys.argv[-1].startswith(("install=", "query=")) and not sys.argv[-1].endswith("fish"):
        return complete(sys.argv[-1])
    if sys.argv[1:2] == ["--version"]:
        print(f"lit-glm {lit_glm.__version__}")
        return 0
    if len(sys.argv) < 2 or sys.argv[1] not in _COMMANDS:
        is_unknown = len(sys.argv) > 1 and sys.argv[1] not in ("-h", "--help")
        if is_unknown:
            install_message_handler()
            log.error(f"{sys.argv[1]}: unknown command")
        print("\n".join(f"  lit-glm {name:9} {text}" for name, text in _COMMANDS.items()))
        return 2 if is_unknown else 0
    command = sys.argv.pop(1)
    sys.argv[0] = f"lit-glm {command}"
    status: int = importlib.import_module(f"lit_glm.{command}").main()
    if command == "train":
        importlib.import_module("lit_glm.launch.signals").ignore_stop_signals()
    return status


if __name__ == "__main__":
    sys.exit(main())
