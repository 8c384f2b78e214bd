#!/usr/bin/env bash
# Train on each normal class of each data set, then print the tables: 30 runs, some hours on two CPU
# cores with JOBS=2. What is finished is skipped.
#   DATASETS=mnist NORMALS="3 8" SEEDS="0 1 2" JOBS=2 OUT=runs bash run_all.sh [flags of pkdgan.py]
set -u # a variable that is not set is an error
set -f # a * in the name of a class stays one

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
program=$(dirname "$0")/pkdgan.py
flags=$*
out=${OUT:-runs}
if [ -n "$flags" ]; then
  out=$out/${flags//\//_} # such as "runs/--batch 16", so that settings do not mix; a / becomes _
fi
mkdir -p "$out" || exit 1

unfinished_runs() { # the flags of each, and its folder last
  for dataset in ${DATASETS:-mnist fmnist cifar10}; do
    for seed in ${SEEDS:-0}; do
      for normal in ${NORMALS:-0 1 2 3 4 5 6 7 8 9}; do
        folder=$out/$dataset-${normal//\//-}-seed$seed
        if ! [ -f "$folder/result.json" ] || ! [ -f "$folder/student.pt" ]; then
          printf '%s\0' --dataset "$dataset" --normal "$normal" --seed "$seed" --out "$folder"
        fi
      done
    done
  done
}

train() { # FLAGS... FOLDER: one run, whose output goes into FOLDER.log
  folder=${@: -1} # the last argument
  trap '' PIPE # the runs go on if nobody reads the names of the folders any more
  if python "$program" "$@" >"$folder.log" 2>&1; then
    echo "$folder"
  else
    echo "failed: see $folder.log" >&2
    return 1
  fi
}
export program
export -f train

trap 'kill %1 2>/dev/null; exit 130' INT TERM HUP
# Each run has eight arguments of unfinished_runs; xargs has JOBS runs go on at a time. By set -m,
# xargs and its runs are a process group, which kill %1 ends.
set -m
unfinished_runs | xargs -0 -r -n 8 -P "${JOBS:-1}" bash -c 'train "$@"' train "$@" &
set +m
failed=0
wait %1 || failed=1
python "$program" --table "$out" || failed=1
exit "$failed"
