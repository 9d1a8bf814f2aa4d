#!/usr/bin/env bash
# Lint, types and all tests. Further arguments go to pytest, and then nothing but pytest runs.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup dev
export PATH="$PWD/.venv/bin:$PATH"
if [ $# -eq 0 ]; then
  ruff check src tests benchmarks
  ruff format --check src tests benchmarks
  mypy & types=$!
  # Where Python is told to write no bytecode, each of some four hundred processes would compile src anew.
  .venv/bin/python -m compileall -q src
  # Types are checked meanwhile. Three at a time on two cores, since tests of silence and of ends mostly wait; a file's tests stay together, since they share what is made once a file. Files of long tests first.
  .venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder
  wait "$types" || { echo "lit_glm: mypy found errors, see above" >&2; exit 1; }
  exit
fi
exec .venv/bin/python -m pytest "$@"
