#!/usr/bin/env bash
# Train on each normal class of each data set, then print the tables. What is finished is skipped.
#   DATASETS=mnist NORMALS="3 8" SEEDS="0 1 2" JOBS=2 OUT=runs bash run_all.sh [flags of pkdgan.py]
set -efum -o pipefail # -f: a * in a name stays one; -m: the runs can be ended together
program=$(dirname "$0")/pkdgan.py flags=$*
out=${OUT:-runs}${flags:+/${flags//\//_}} # runs with flags have a folder of their own
mkdir -p "$out"
one='python "${@:2}" >"$1.log" 2>&1 && echo "$1" || { echo "failed: see $1.log" >&2; exit 1; }'
for dataset in ${DATASETS:-mnist fmnist cifar10}; do
  for seed in ${SEEDS:-0}; do
    for normal in ${NORMALS:-0 1 2 3 4 5 6 7 8 9}; do
      run=$out/$dataset-${normal//\//-}-seed$seed
      [ -f "$run/result.json" ] && [ -f "$run/student.pt" ] && continue
      printf '%s\0' "$run" "$program" --dataset "$dataset" --normal "$normal" --seed "$seed" --out "$run" "$@"
    done
  done
done | xargs -0 -r -n $((10 + $#)) -P "${JOBS:-1}" bash -c "$one" one & # a run is 10 words and flags
trap 'kill %1; exit 130' INT TERM HUP
wait %1 || failed=1
python "$program" --table "$out" && exit ${failed:-0}
