#!/usr/bin/env bash
# All tests on the seed stack (Python 3.8, torch 1.12.1): the software environment of the published R300 rows.
# Builds it in .venv-seed once; with --install that is all. Other arguments go to pytest. Exit status 3: no Python 3.8
# here, nothing was run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python38() {
  local candidate
  for candidate in "${PYTHON38:-}" python3.8 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.8*/bin/python; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 8))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

if ! python38=$(find_python38); then
  echo "lit_glm: NOT RUN: the seed stack (Python 3.8, torch 1.12.1) was not tested: no python3.8 found." >&2
  echo "         Install it (pyenv install 3.8), or set PYTHON38=/path/to/python3.8." >&2
  exit 3
fi
stamp=.venv-seed/installed
wanted=$(cat pyproject.toml constraints/seed.txt | cksum)
# In a checkout that was copied or moved, the environment that this script made would still run the code of the old place.
[ ! -e "$stamp" ] || grep -qF "$(pwd -P)/.venv-seed" .venv-seed/bin/activate || rm -rf .venv-seed
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "lit_glm: installing the seed stack into .venv-seed (once)" >&2
  [ -x .venv-seed/bin/python ] || "$python38" -m venv .venv-seed
  .venv-seed/bin/pip install -q -U 'pip<25.1'
  # The published +cpu build where torch's own index is in reach, else PyPI's build of the same version.
  .venv-seed/bin/python -c "import torch; assert torch.__version__.split('+')[0] == '1.12.1'" 2>/dev/null \
    || .venv-seed/bin/pip install -q torch==1.12.1+cpu --index-url https://download.pytorch.org/whl/cpu 2>/dev/null \
    || .venv-seed/bin/pip install -q torch==1.12.1
  .venv-seed/bin/pip install -q -c constraints/seed.txt -e '.[test]'
  echo "$wanted" > "$stamp"
fi
[ "${1:-}" != --install ] || exit 0
# Where Python is told to write no bytecode, each process would compile src anew.
.venv-seed/bin/python -m compileall -q src
exec .venv-seed/bin/python -m pytest "$@"
