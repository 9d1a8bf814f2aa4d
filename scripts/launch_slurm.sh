#!/usr/bin/env bash
# Several nodes under Slurm: one task a node; this script finds out the rest.
#
#   srun --nodes=2 --ntasks-per-node=1 bash scripts/launch_slurm.sh hardware=r300 topology=2x8
#   sbatch --nodes=2 --ntasks-per-node=1 --wrap 'srun bash scripts/launch_slurm.sh hardware=r300 topology=2x8'
#
# All arguments are handed to train. All nodes share one run folder, outputs/slurm-JOB.STEP, unless hydra.run.dir says
# another; a job that Slurm has requeued goes on there.
set -euo pipefail
if [ -z "${SLURM_NODEID:-}" ] || [ -z "${SLURM_JOB_NODELIST:-}" ]; then
  echo "lit_glm: not under Slurm (SLURM_NODEID, SLURM_JOB_NODELIST); start it with srun:" >&2
  sed -n '4,5s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
if [ "${SLURM_NTASKS:-1}" != "${SLURM_STEP_NUM_NODES:-${SLURM_NTASKS:-1}}" ]; then
  echo "lit_glm: $SLURM_NTASKS tasks on $SLURM_STEP_NUM_NODES nodes: one task a node (--ntasks-per-node=1); the ranks are started by train" >&2
  exit 2
fi
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))} NODE_RANK=$SLURM_NODEID
folder="hydra.run.dir=outputs/slurm-$SLURM_JOB_ID.${SLURM_STEP_ID:-0}"
for argument in "$@"; do
  case "$argument" in hydra.run.dir=* | -m | --multirun | run.resume=*) folder="" ;; esac
done
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$([ -x "$here/.venv/bin/python" ] && echo "$here/.venv/bin/python" || echo python)}
exec "$python" -m lit_glm.train "$@" ${folder:+"$folder"}
