#!/usr/bin/env bash
# Each data set, seed and normal class asked for; then the tables of OUT (not by a Slurm array).
#   bash run_all.sh                          # MNIST, Fashion-MNIST, CIFAR-10, ten classes, seed 0
#   DATASETS=mnist NORMALS="3 8" SEEDS="0 1 2" JOBS=2 OUT=runs bash run_all.sh [pkdgan.py's flags]
#   sbatch --array=0-29 run_all.sh           # Slurm: each task of the array does its share
# JOBS runs go at a time. Stop it as you like: started again, it goes on where it was.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ -f "$HERE/pkdgan.py" ] || HERE=$SLURM_SUBMIT_DIR # Slurm starts a copy that lies elsewhere
PYTHON=$(command -v python || command -v python3) OUT=${OUT:-runs} JOBS=${JOBS:-1} n=0
export HERE PYTHON OUT
fail() { echo "run_all.sh: $*" >&2 && exit 2; }
[[ $JOBS =~ ^[1-9][0-9]*$ ]] || fail "JOBS=$JOBS must be a number from 1"
for flag; do
  [[ $flag =~ ^--(dataset|normal|seed|out|score|table) ]] &&
    fail "$flag: set DATASETS, NORMALS, SEEDS or OUT before the command instead"
done
runs=$(for dataset in ${DATASETS:-mnist fmnist cifar10}; do
  "$PYTHON" "$HERE/pkdgan.py" --dataset "$dataset" "$@" --table / >/dev/null || exit 2 # flags
  for seed in ${SEEDS:-0}; do
    for normal in ${NORMALS:-0 1 2 3 4 5 6 7 8 9}; do echo "$dataset $seed $normal"; done
  done
done)
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then # this task's share: each COUNT-th line
  share=$(((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN) / ${SLURM_ARRAY_TASK_STEP:-1}))
  ((share < SLURM_ARRAY_TASK_COUNT)) || fail "--array must be one range, such as 0-29"
  runs=$(awk "(NR - 1) % $SLURM_ARRAY_TASK_COUNT == $share" <<<"$runs") && [ "$runs" ] || exit 0
fi
one() { # one DATASET SEED NORMAL FLAGS
  log=$OUT/$1-${3//\//-}-seed$2.log
  "$PYTHON" "$HERE/pkdgan.py" "${@:4}" --dataset "$1" --seed "$2" --normal "$3" --out "$OUT" \
    --skip-finished >>"$log" 2>&1 </dev/null && echo "$log" && return
  failure="no result: $log: $(tail -n 1 "$log")"
  echo "$failure" && echo "$failure" >&2 && return 1
}
export -f one && mkdir -p "$OUT"
cores=${OMP_NUM_THREADS:-${SLURM_CPUS_ON_NODE:-$(getconf _NPROCESSORS_ONLN)}}
export OMP_NUM_THREADS=$((cores > JOBS ? cores / JOBS : 1))
set -m # gives what & starts a process group, to be ended as one; xargs puts a run after the flags
xargs -n 3 -P "$JOBS" bash -c 'one "${@: -3}" "${@:1:$#-3}"' _ "$@" <<<"$runs" |
  while read -r line; do echo "[$((++n))/$(wc -l <<<"$runs")] $line"; done &
trap 'trap - TERM; kill -- "-$(jobs -p)"; exit 130' INT TERM HUP
wait %1 || failed=1
[ -n "${SLURM_ARRAY_TASK_ID:-}" ] || "$PYTHON" "$HERE/pkdgan.py" --table "$OUT" || failed=1
exit "${failed:-0}"
