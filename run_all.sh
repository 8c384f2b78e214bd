#!/usr/bin/env bash
# Train on each normal class of each data set, then print the tables: 30 runs, some hours on two CPU
# cores with JOBS=2. What is finished is skipped.
#   DATASETS=mnist NORMALS="3 8" SEEDS="0 1 2" JOBS=2 OUT=runs bash run_all.sh [flags of pkdgan.py]
set -u # a variable that is not set is an error
set -f # a * in the name of a class stays one
set -m # each run is a process group of its own, which stop() can kill

program=$(dirname "$0")/pkdgan.py
flags=$*
for flag in "$@"; do
  case ${flag%%=*} in # --seed=3 is --seed
    -h | --help)
      sed -n '2,4s/^# //p' "$0"
      exit
      ;;
    --dataset | --normal | --seed | --out)
      echo "run_all.sh: set DATASETS, NORMALS, SEEDS or OUT instead of $flag" >&2
      exit 2
      ;;
  esac
done
out=${OUT:-runs}
if [ -n "$flags" ]; then
  out=$out/${flags//\//_} # such as "runs/--batch 16", so that settings do not mix; a / becomes _
fi
mkdir -p "$out" || exit 1
failures=$(mktemp) || exit 1 # a line for each run that fails

stop() { # end the runs that are going on, and this script
  rm -f "$failures"
  for run in $(jobs -rp); do
    kill -- "-$run" 2>/dev/null
  done
  exit 130
}
trap stop INT TERM HUP

train() { # FOLDER FLAGS...: one run, whose output goes into FOLDER.log
  if python "$program" "${@:2}" --out "$1" >"$1.log" 2>&1; then
    echo "$1"
  else
    echo "failed: see $1.log" | tee -a "$failures" >&2
  fi
}

for dataset in ${DATASETS:-mnist fmnist cifar10}; do
  for seed in ${SEEDS:-0}; do
    for normal in ${NORMALS:-0 1 2 3 4 5 6 7 8 9}; do
      folder=$out/$dataset-${normal//\//-}-seed$seed
      if [ -f "$folder/result.json" ] && [ -f "$folder/student.pt" ]; then
        continue
      fi
      until [ "$(jobs -rp | wc -l)" -lt "${JOBS:-1}" ]; do # until there is a place for one more run
        sleep 0.2 &
        wait $! # a sleep in the foreground would get Ctrl-C instead of this script
      done
      train "$folder" "$@" --dataset "$dataset" --normal "$normal" --seed "$seed" &
    done
  done
done

wait # for the last runs
failed=0
if [ -s "$failures" ]; then
  failed=1
fi
rm -f "$failures"
python "$program" --table "$out" || failed=1
exit "$failed"
