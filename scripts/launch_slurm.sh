#!/usr/bin/env bash
# Several nodes under Slurm: one task a node; this script finds out the rest.
#
#   srun --kill-on-bad-exit=1 --nodes=2 --ntasks-per-node=1 bash scripts/launch_slurm.sh hardware=r300 topology=2x8
#   sbatch --nodes=2 --ntasks-per-node=1 --wrap 'srun --kill-on-bad-exit=1 bash scripts/launch_slurm.sh hardware=r300 topology=2x8'
#
# All arguments are handed to train. All nodes share one run folder, outputs/slurm-JOB.STEP, unless hydra.run.dir says
# another; a job that Slurm has requeued goes on there. docs/clusters.md has requeueing and time limits.
set -euo pipefail
lines() { sed -n '4,5s/^# \{0,1\}//p' "$0" >&2; }
if [ -z "${SLURM_NODEID:-}" ] || [ -z "${SLURM_JOB_NODELIST:-}" ]; then
  echo "lit_glm: not under Slurm (SLURM_NODEID, SLURM_JOB_NODELIST); start it with srun:" >&2
  lines
  exit 2
fi
nodes=${SLURM_STEP_NUM_NODES:-}
if [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ] && { [ -z "$nodes" ] || [ -z "${SLURM_STEP_ID:-}" ]; }; then
  echo "lit_glm: the job has $SLURM_JOB_NUM_NODES nodes, but this runs on one of them alone: srun is missing; write" >&2
  lines
  exit 2
fi
if [ "${SLURM_NTASKS:-1}" != "${nodes:-${SLURM_NTASKS:-1}}" ]; then
  echo "lit_glm: $SLURM_NTASKS tasks on $nodes nodes: one task a node (--ntasks-per-node=1); the ranks are started by train" >&2
  exit 2
fi
if [ "${nodes:-1}" -gt 1 ]; then
  hosts=${SLURM_STEP_NODELIST:-$SLURM_JOB_NODELIST} # a step may have a part of the job's nodes
  if [ -z "${MASTER_ADDR:-}" ] && ! MASTER_ADDR=$(scontrol show hostnames "$hosts" 2>/dev/null | head -n 1); then
    echo "lit_glm: there is no scontrol here, as in some containers; set MASTER_ADDR to the first node of $hosts" >&2
    exit 2
  fi
  # Another one for each step of a job, below the ports that the kernel gives to connections (from 32768).
  export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((20000 + (SLURM_JOB_ID * 16 + ${SLURM_STEP_ID:-0}) % 12000))} NODE_RANK=$SLURM_NODEID
else
  unset MASTER_ADDR MASTER_PORT NODE_RANK # train takes a free port
fi
folder="hydra.run.dir=outputs/slurm-$SLURM_JOB_ID.${SLURM_STEP_ID:-0}"
for argument in "$@"; do
  case "$argument" in hydra.run.dir=* | -m | --multirun | run.resume=*) folder="" ;; esac
done
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$([ -x "$here/.venv/bin/python" ] && echo "$here/.venv/bin/python" || echo python)}
exec "$python" -m lit_glm.train "$@" ${folder:+"$folder"}
