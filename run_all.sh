#!/usr/bin/env bash
# Every data set, seed and normal class: runs what has no result yet, then prints the table.
#
#   bash run_all.sh                          # MNIST, Fashion-MNIST, CIFAR-10, ten classes, seed 0
#   DATASETS=mnist NORMALS="3 8" SEEDS="0 1 2" JOBS=2 OUT=runs bash run_all.sh [pkdgan.py's flags]
#   sbatch --array=0-29 run_all.sh           # Slurm: each task of the array does its share
#   JOBS=0 bash run_all.sh                   # nothing but the table of what there is
#
# JOBS runs go at a time and share the cores. Each has a log in OUT, and a folder with its result.
# Stop this however you like and start it again: what has a result of the same settings is skipped.
set -euo pipefail -f
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ -f "$HERE/pkdgan.py" ] || HERE=$SLURM_SUBMIT_DIR # Slurm starts a copy that lies elsewhere
PYTHON=$(command -v python || command -v python3)
JOBS=${JOBS:-1} OUT=${OUT:-runs} BEGAN=$(date +%s)
fail() { echo "run_all.sh: $*" >&2 && exit 2; }
[[ $JOBS =~ ^[0-9]+$ ]] || fail "JOBS=$JOBS must be a number"
for flag; do case $flag in --dataset* | --normal* | --seed* | --out* | --score*)
  fail "$flag: set DATASETS, NORMALS, SEEDS or OUT before the command instead" ;; esac; done

runs=()
for dataset in ${DATASETS:-mnist fmnist cifar10}; do
  for seed in ${SEEDS:-0}; do
    for normal in ${NORMALS:-0 1 2 3 4 5 6 7 8 9}; do runs+=("$dataset $seed $normal"); done
  done
done
[ ${#runs[@]} -gt 0 ] || fail "nothing to run: DATASETS, NORMALS or SEEDS is blank"
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  shares=${SLURM_ARRAY_TASK_COUNT:-${#runs[@]}}
  share=$(((SLURM_ARRAY_TASK_ID - ${SLURM_ARRAY_TASK_MIN:-0}) / ${SLURM_ARRAY_TASK_STEP:-1}))
  ((share < shares)) || fail "--array must be one range, such as 0-29"
  for i in "${!runs[@]}"; do ((i % shares == share)) || unset "runs[i]"; done
fi

results() { # results todo|table FLAGS: the runs to do, as "DATASET SEED NORMAL LOG", or the table
  printf '%s\n' "${runs[@]}" >"$OUT/.runs.$$"
  HERE=$HERE RUNS="$OUT/.runs.$$" OUT=$OUT "$PYTHON" - "$@" <<'END'
END
}
