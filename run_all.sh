#!/usr/bin/env bash
# Train on each normal class of each data set, then print the tables: 30 runs, some hours on two CPU
# cores with JOBS=2. What is finished is skipped.
#   DATASETS=mnist NORMALS="3 8" SEEDS="0 1" JOBS=2 OUT=runs/all bash run_all.sh [pkdgan.py's flags]
# These variables stand for the flags --dataset, --normal, --seed and --out.
for flag in "$@"; do
  case ${flag%%=*} in # --seed=3 is --seed
    -h | --help | --dataset | --normal | --seed | --out | --score | --table)
      sed -n '2,5s/^# //p' "$0" >&2 # the lines above
      exit 2
      ;;
  esac
done
program=$(dirname "$0")/pkdgan.py
out=${OUT:-runs/all} # not runs, where single runs are, perhaps with flags of their own
if [ $# -gt 0 ]; then
  flags=$*
  out=$out/${flags//\//_} # such as "runs/all/--batch 16": settings do not mix; a / becomes _
fi
mkdir -p "$out" || exit 1

finished() { # FOLDER
  [ -f "$1/result.json" ] && [ -f "$1/student.pt" ]
}

train() { # FOLDER FLAGS...: one run, whose output goes into FOLDER.log
  folder=$1
  shift
  if python "$program" "$@" >"$folder.log" 2>&1; then
    echo "$folder"
  else
    echo "failed: see $folder.log" >&2
  fi
}

stop() {
  for run in $(jobs -rp); do
    kill -- "-$run" 2>/dev/null # the minus means the whole process group
  done
  exit 130
}
trap stop INT TERM HUP

started=()
for dataset in ${DATASETS:-mnist fmnist cifar10}; do
  for seed in ${SEEDS:-0}; do
    for normal in ${NORMALS:-0 1 2 3 4 5 6 7 8 9}; do
      folder=$out/$dataset-${normal//\//-}-seed$seed
      if finished "$folder"; then
        continue
      fi
      while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-1}" ]; do
        sleep 0.2
      done
      started+=("$folder")
      set -m # each run becomes a process group; sleep stays in ours, which Ctrl-C reaches
      train "$folder" "$@" --dataset "$dataset" --normal "$normal" --seed "$seed" --out "$folder" &
      set +m
    done
  done
done
wait

python "$program" --table "$out" || exit 1
for folder in "${started[@]}"; do
  finished "$folder" || exit 1
done
