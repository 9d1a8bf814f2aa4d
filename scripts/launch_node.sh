#!/usr/bin/env bash
# Several nodes, by hand: type this on each node, with its own number and the address of node 0.
#
#   bash scripts/launch_node.sh 0 10.0.0.1 29500 hardware=r300 topology=2x8     # on node 0, whose address is 10.0.0.1
#   bash scripts/launch_node.sh 1 10.0.0.1 29500 hardware=r300 topology=2x8     # on node 1
#
# Everything behind the port is handed to train. PYTHON says which python (default: .venv's, else the first on PATH).
set -euo pipefail
if [ $# -lt 3 ]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
export NODE_RANK=$1 MASTER_ADDR=$2 MASTER_PORT=$3
shift 3
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$([ -x "$here/.venv/bin/python" ] && echo "$here/.venv/bin/python" || echo python)}
exec "$python" -m lit_glm.train "$@"
