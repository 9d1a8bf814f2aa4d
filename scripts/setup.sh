#!/usr/bin/env bash
# Sourced by the other scripts: a virtual environment in .venv with pinned dependencies. A second run skips what is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3 python3.12 python3.13; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 \
      && "$candidate" -c 'import sys; sys.exit(not sys.version_info >= (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "lit_glm: Python 3.11 or newer is needed; set PYTHON=/path/to/python" >&2
  return 1
}

install_torch() {
  # The CPU build. Wheels called +cpu lie on torch's own index and on machines that were given one; a plain `torch`
  # from PyPI would bring gigabytes of CUDA on Linux, and is what is left where neither is in reach.
  local version
  version=$(sed -n 's/^torch==//p' constraints/current.txt)
  .venv/bin/python -c "import torch; assert torch.__version__.split('+')[0] == '$version'" 2>/dev/null && return
  .venv/bin/pip install -q --no-compile "torch==$version+cpu" 2>/dev/null \
    || .venv/bin/pip install -q --no-compile "torch==$version" --index-url https://download.pytorch.org/whl/cpu 2>/dev/null \
    || .venv/bin/pip install -q --no-compile "torch==$version"
}

setup() { # setup EXTRA
  local stamp=".venv/installed-$1" wanted
  wanted=$(cat pyproject.toml constraints/current.txt | cksum)
  # In a checkout that was copied or moved, the environment that this script made would still run the code of the old place.
  [ ! -e "$stamp" ] || grep -qF "$(pwd -P)/.venv" .venv/bin/activate || rm -rf .venv
  [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
  echo "lit_glm: installing into .venv (once)" >&2
  [ -x .venv/bin/python ] || "$(find_python)" -m venv .venv
  install_torch
  local target="."
  [ -n "$1" ] && target=".[$1]"
  .venv/bin/pip install -q --no-compile -c constraints/current.txt -e "$target"
  # Bytecode, on all cores, without tests and what nothing imports: pip takes a third of an installation for it.
  .venv/bin/python -m compileall -q -j 0 -x '/(tests?|testing/_internal|databricks|networkx|pip|setuptools|mypy)/' .venv/lib \
    >/dev/null || true
  echo "$wanted" > "$stamp"
}
