"""Path of the configuration files that come with the package (conf/)."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
CONF_DIR = next(
    folder
    for folder in (_HERE.parent / "conf", _HERE.parent.parent.parent / "conf")  # in a wheel, in a checkout
    if (folder / "train.yaml").is_file()
)
