#!/usr/bin/env bash
# Train on each normal class of each data set, then print the tables: 30 runs, some hours on two CPU
# cores with JOBS=2. What is finished is skipped.
#   DATASETS=mnist NORMALS="3 8" SEEDS="0 1 2" JOBS=2 OUT=runs bash run_all.sh [flags of pkdgan.py]
set -ufm # -f: a * in a name stays one; -m: each run is a process group, which can be killed
program=$(dirname "$0")/pkdgan.py flags=$* runs= failed=0
out=${OUT:-runs}${flags:+/${flags//\//_}} # "runs", or, where flags are given, "runs/--batch 16"
mkdir -p "$out" || exit 1
trap 'for run in $(jobs -rp); do kill -- "-$run" 2>/dev/null; done; exit 130' INT TERM HUP
train() { # FOLDER FLAGS...
  python "$program" "${@:2}" --out "$1" >"$1.log" 2>&1 && echo "$1" && return
  echo "failed: see $1.log" >&2 && return 1
}
for dataset in ${DATASETS:-mnist fmnist cifar10}; do
  for seed in ${SEEDS:-0}; do
    for normal in ${NORMALS:-0 1 2 3 4 5 6 7 8 9}; do
      folder=$out/$dataset-${normal//\//-}-seed$seed
      [ -f "$folder/result.json" ] && [ -f "$folder/student.pt" ] && continue
      until [ "$(jobs -rp | wc -l)" -lt "${JOBS:-1}" ]; do
        sleep 0.2 & wait $! # in the foreground, sleep would get Ctrl-C instead of this script
      done
      train "$folder" "$@" --dataset "$dataset" --normal "$normal" --seed "$seed" &
      runs="$runs $!"
    done
  done
done
for run in $runs; do wait "$run" || failed=1; done
python "$program" --table "$out" && exit "$failed"
