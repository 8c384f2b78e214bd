#!/usr/bin/env bash
# Every data set, seed and normal class: runs what has no result yet, then prints the table.
#   bash run_all.sh                          # MNIST, Fashion-MNIST, CIFAR-10, ten classes, seed 0
#   DATASETS=mnist NORMALS="3 8" SEEDS="0 1 2" JOBS=2 OUT=runs bash run_all.sh [pkdgan.py's flags]
#   sbatch --array=0-29 run_all.sh           # Slurm: each task of the array does its share
#   JOBS=0 bash run_all.sh                   # nothing but the table of what there is
# JOBS runs share the cores (have the data first). Stop this as you like: started again, it skips finished runs.
set -aeuo pipefail -f # -a: the runs' processes have what follows, functions too; -f: no globbing
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) PYTHON=$(command -v python || command -v python3 || echo python3)
[ -f "$HERE/pkdgan.py" ] || HERE=$SLURM_SUBMIT_DIR # Slurm starts a copy that lies elsewhere
DATASETS=${DATASETS:-mnist fmnist cifar10} NORMALS=${NORMALS:-0 1 2 3 4 5 6 7 8 9}
SEEDS=${SEEDS:-0} JOBS=${JOBS:-1} OUT=${OUT:-runs} BEGAN=$(date +%s)
fail() { echo "run_all.sh: $*" >&2 && exit 2; }
[[ $JOBS =~ ^(0|[1-9][0-9]*)$ ]] || fail "JOBS=$JOBS must be a number"
for flag; do case $flag in --dataset* | --normal* | --seed* | --out* | --score*)
  fail "$flag: set DATASETS, NORMALS, SEEDS or OUT before the command instead" ;; esac; done
RUNS=$(for d in $DATASETS; do for s in $SEEDS; do for n in $NORMALS; do echo "$d $s $n"; done; done; done)
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  share=$(((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN) / ${SLURM_ARRAY_TASK_STEP:-1}))
  ((share < SLURM_ARRAY_TASK_COUNT)) || fail "--array must be one range, such as 0-29"
  RUNS=$(awk "(NR - 1) % $SLURM_ARRAY_TASK_COUNT == $share" <<<"$RUNS") && [ -n "$RUNS" ] || exit 0
fi
results() { # results todo FLAGS: a line "DATASET SEED NORMAL LOG" for each; results table FLAGS
  "$PYTHON" - "$@" <<'END'
import contextlib, json, os, pathlib, statistics as st, sys
sys.path.insert(0, os.environ["HERE"]); import pkdgan, torch
(mode, *flags), out = sys.argv[1:], pathlib.Path(os.environ["OUT"])
have, found = [], {}  # results in OUT; those of the runs asked for, (title, seed, normal): None or a result
for file in out.glob("*-seed*/result.json"):
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # another program's, just removed
        r = json.loads(file.read_text())
        for auroc in (r["auroc"], r["auroc_whitened"]):
            auroc["gain"] = auroc["step2"] - auroc["student_alone"]
        have += [r] if r["version"] == pkdgan.VERSION else []
for d, s, n in map(str.split, os.environ["RUNS"].splitlines()):
    want = vars(pkdgan.parse([*flags, "--dataset", d, "--seed", s, "--normal", n]))
    bf16 = (True, False) if mode == "table" else [pkdgan.native_bf16(torch.device(want["device"]).type)]
    run = (pathlib.Path(want["data"]).resolve().name if d == "folder" else d), s, n
    found[run] = None
    for r in have:  # it is this run's if all settings are equal but those that change no figure
        its = r["settings"]
        ignored = {key: its[key] for key in ("out", "device", "alpha", "normal", "score")}
        unasked = {key: want[key] or its[key] for key in ("ablation", "curve")}  # may be there all the same
        if (want | ignored | unasked) == its and n in (r["normal"], its["normal"]) and r["bf16"] in bf16:
            found[run] = r
    if mode == "todo" and not found[run]:
        print(d, s, n, out / f"{run[0]}-{n}-seed{s}.log".replace("/", "-"))
mode == "todo" and sys.exit()
def cell(key, seeds):  # seeds: of each, its classes' results. Mean and deviation over seeds of means over classes
    seeds = [rs for rs in seeds if all(key in r["auroc"] for r in rs)]
    both = ([st.mean(r[kind][key] for r in rs) for rs in seeds] for kind in ("auroc", "auroc_whitened"))
    cells = (f"{st.mean(m):.2f}" + (f" ± {st.stdev(m):.2f}" if len(m) > 1 else "") for m in both if m)
    return " / ".join(cells) or "missing"
for title in dict.fromkeys(title for title, *_ in found):
    seeds, normals = (list(dict.fromkeys(run[i] for run in found if run[0] == title)) for i in (1, 2))
    mine = [r for run, r in found.items() if r and run[0] == title]
    rival = ["joint_only"] * any("joint_only" in r["auroc"] for r in mine)
    keys = ["teacher", "student_alone", "step1", "step2", "gain", *rival]
    print(f"\n| {title}, AUROC in %, plain / whitened | {' | '.join(keys)} | seeds |\n|" + "---|" * (len(keys) + 2))
    for name, group in [*((n, [n]) for n in normals), ("mean", normals)]:
        full = [rs for rs in ([found[title, s, n] for n in group] for s in seeds) if all(rs)]  # the whole group's
        print(f"| {name} | {' | '.join(cell(key, full) for key in keys)} | {len(full)} of {len(seeds)} |")
    print(*{f"\n{r['split']} split, {r['device']}, torch {r['versions']['torch']}, FLOPs {r['ratio']:.2f} : 1" for r in mine})
sys.exit(None in found.values())
END
}
one() { # one "DATASET SEED NORMAL LOG" FLAGS
  local dataset seed normal log failed=0 && read -r dataset seed normal log <<<"$1" && shift
  "$PYTHON" "$HERE/pkdgan.py" "$@" --dataset "$dataset" --normal "$normal" --seed "$seed" \
    --out "$OUT" >"$log" 2>&1 </dev/null || failed=1
  echo >>"$TALLY" && n=$(wc -l <"$TALLY")
  echo "[$n/$TODO] $log, $((($(date +%s) - BEGAN) * (TODO - n) / n / 60)) min left"
  ((failed == 0)) || { echo "no result: $log: $(tail -n 1 "$log")" >&2 && return 1; }
}
if ((JOBS > 0)); then
  todo=$(results todo "$@")
  TODO=$(grep -c . <<<"$todo" || true) TALLY=$(mktemp)
  echo "$(wc -l <<<"$RUNS") runs, $(($(wc -l <<<"$RUNS") - TODO)) of them finished before; logs in $OUT"
  cores=${OMP_NUM_THREADS:-${SLURM_CPUS_ON_NODE:-$(getconf _NPROCESSORS_ONLN)}}
  OMP_NUM_THREADS=$((cores > JOBS ? cores / JOBS : 1)) && mkdir -p "$OUT"
  trap 'rm -f "$TALLY"' EXIT && trap 'echo "interrupted; the same command goes on" >&2; exit 130' INT
  printf %s "$todo" | tr '\n' '\0' | xargs -0 -P "$JOBS" -I{} bash -c 'one "$@"' _ {} "$@" || failed=1
fi
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || exit "${failed:-0}" # the table would lack the other tasks' runs
results table "$@" && exit "${failed:-0}" # fails, too, if a result is missing
