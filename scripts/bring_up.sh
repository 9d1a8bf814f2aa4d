#!/usr/bin/env bash
# First tests of a new device in one command: checks, speeds, profile, and one page for its vendor.
#
#   bash scripts/bring_up.sh hardware=h100 [key=value ...] [--minutes 8]
#   bash scripts/bring_up.sh hardware=cpu --minutes 5          # tiny shapes, to see what it does
#
# Steps run in order of value, each in its own process with its own time limit; steps for which no time is left are
# listed. The folder bring-up/DATE contains bring_up.md, the report of all runs, and all logs.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$([ -x "$here/.venv/bin/python" ] && echo "$here/.venv/bin/python" || echo python)}
exec "$python" "$here/scripts/bring_up.py" "$@"
