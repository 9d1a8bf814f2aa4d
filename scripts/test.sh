#!/usr/bin/env bash
# Set-up, lint, types and tests.
#   bash scripts/test.sh              all tests except those marked slow
#   bash scripts/test.sh --all        all tests: what CI runs
#   bash scripts/test.sh --changed    tests of what differs from HEAD (--changed REV: from REV) and of what imports it
#   bash scripts/test.sh ARGUMENTS    pytest alone, with these arguments
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup dev
export PATH="$PWD/.venv/bin:$PATH"
select=(-m "not slow")
case "${1:-}" in
  "") ;;
  --all) select=(--durations=30) ;;
  --changed)
    mapfile -t select < <(python scripts/changed_tests.py "${2:-HEAD}")
    [ "${#select[@]}" -gt 0 ] || { echo "lit_glm: nothing that has tests differs from ${2:-HEAD}" >&2; exit 0; }
    select+=(-m "not slow")
    ;;
  *) exec python -m pytest "$@" ;;
esac
ruff check src tests benchmarks scripts
ruff format --check src tests benchmarks scripts
mypy & types=$!
# Where Python is told to write no bytecode, each process would compile src anew.
python -m compileall -q src
# Types are checked meanwhile. Four at a time on two cores: tests of silence and of ends mostly wait. A file's tests
# stay together, since they share what is made once per file.
python -m pytest -n 4 --dist loadfile --no-loadscope-reorder "${select[@]}"
wait "$types" || { echo "lit_glm: mypy found errors, see above" >&2; exit 1; }
