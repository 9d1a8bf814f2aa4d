"""A check that never hides the others, and what to do where its error does not say it."""

from typing import Callable

from lit_glm.errors import InputError, RunError
from lit_glm.finding import Finding

_DATA = "copy the file again and compare the sizes, or make it anew with python -m lit_glm.prepare"
_ADVICE = {
    "devices": "choose a topology or a hardware file that fits, or look at what hides cards (..._VISIBLE_DEVICES)",
    "precision": "choose another precision",
    "port": "set MASTER_PORT to a free one, the same on every node, or unset it on a single node",
    "collectives": "look at the network between the ranks and at the variables of the collective library",
    "data.train_file": _DATA,
    "data.eval_file": _DATA,
    "checkpoint": "copy the checkpoint again and compare the sizes; its shape is that of model=...",
}
"""What to do where the error itself does not say it."""


def checked_by(name: str, check: Callable[[], Finding]) -> Finding:
    """Run a check; whatever it raises is a finding too.

    Args:
        name: of the line.
        check: leaves its finding's name empty.
    """
    try:
        found = check()
    except (InputError, RunError) as error:
        first, *more = [line.strip() for line in str(error).splitlines()]
        return Finding(name, "fail", first, "; ".join(more) or _ADVICE.get(name, ""))
    except Exception as error:  # a check must never hide the others
        return Finding(name, "fail", f"{type(error).__name__}: {' '.join(str(error).split())}")
    found.name = name
    found.said = " ".join(found.said.split())
    return found
