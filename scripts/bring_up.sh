#!/usr/bin/env bash
# The first day of a device in one command: checks, speeds, profile, and one page for its vendor.
#
#   bash scripts/bring_up.sh hardware=h100 [key=value ...] [--minutes 8]
#   bash scripts/bring_up.sh hardware=cpu --minutes 5          # tiny shapes, to see what it does
#
# Steps run in order of value, each in a process of its own with its own limit; what the time does not allow is listed.
# The folder that it leaves (bring-up/DATE) has bring_up.md, the report of all runs, and all logs.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$([ -x "$here/.venv/bin/python" ] && echo "$here/.venv/bin/python" || echo python)}
exec "$python" "$here/scripts/bring_up.py" "$@"
