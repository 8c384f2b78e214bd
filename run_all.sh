#!/usr/bin/env bash
# Every data set, normal class and seed: runs what has no result yet, then prints the table.
#
#   bash run_all.sh                              # MNIST, Fashion-MNIST and CIFAR-10, ten classes each, seed 0
#   DATASETS=mnist NORMALS="3 8" SEEDS="0 1 2" JOBS=2 OUT=runs bash run_all.sh [any flag of pkdgan.py]
#   sbatch --array=0-29 run_all.sh               # Slurm: each task of the array does its share
#   JOBS=0 bash run_all.sh                       # nothing but the table of what there is
#
# JOBS runs go at a time and share the cores. Each has a log, OUT/<run>.log, and a folder with its result.json. What
# has a result for the same settings is skipped: stop this however you like, and start it again. A run with other
# settings replaces the result; give it another OUT.
set -euo pipefail
cd "$(dirname "$0")"
[ -f pkdgan.py ] || cd "$SLURM_SUBMIT_DIR" # Slurm starts a copy of this script that lies elsewhere
exec python - "$@" <<'EOF'
import fcntl, json, os, shlex, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import mean, stdev
import pkdgan, torch

ask = {"DATASETS": "mnist fmnist cifar10", "NORMALS": "0 1 2 3 4 5 6 7 8 9", "SEEDS": "0", "JOBS": "1", "OUT": "runs"}
ask = {key: os.environ.get(key) or default for key, default in ask.items()}
datasets, normals, seeds = (ask[key].split() for key in ("DATASETS", "NORMALS", "SEEDS"))
out, flags, in_array = Path(ask["OUT"]), sys.argv[1:], "SLURM_ARRAY_TASK_ID" in os.environ
PAPER = {  # teacher : student in computation; teacher, student alone, step 1, step 2, gain: means of ten classes, in %
    "mnist": ["311.11", "97.80", "95.48", "", "97.25", "+1.77"],
    "fmnist": ["700", "93.1", "91.20", "", "92.93", "+1.73"],
    "cifar10": ["24.45", "73.76", "70.61", "", "73.05", "+2.44"]}
command = {(d, n, s): [*flags, "--dataset", d, "--normal", n, "--seed", s, "--out", ask["OUT"]]
           for d in datasets for s in seeds for n in normals}
try:
    if not ask["JOBS"].isdigit():
        raise ValueError(f"JOBS={ask['JOBS']} must be a number")
    jobs = int(ask["JOBS"])  # the device is that of the runs: here, a GPU would be taken for nothing
    wanted = {run: vars(pkdgan.parse([*args, "--device", "cpu"])) for run, args in command.items()}
    task, first, step, shares = (int(os.environ.get(f"SLURM_ARRAY_TASK_{key}", default)) for key, default in (
        ("ID", 0), ("MIN", 0), ("STEP", 1), ("COUNT", len(command))))
    if in_array and (task - first) // step >= shares:
        raise ValueError("--array must be one range, such as 0-29; runs that are finished are skipped")
except ValueError as error:  # of JOBS, of a flag or of the array
    sys.exit(print("run_all.sh:", error, file=sys.stderr) or 2)
cores = int(os.environ.get("SLURM_CPUS_ON_NODE", torch.get_num_threads()))
mine = list(command)[(task - first) // step::shares] if in_array else list(command)
title = {d: Path(s["data"]).resolve().name if d == "folder" else d for (d, _, _), s in wanted.items()}
log = {(d, n, s): out / f"{title[d]}-{n}-seed{s}.log".replace("/", "-") for d, n, s in command}


def results():
    """{run: result} of the runs with a result for these settings. A rival that nobody asked for does no harm."""
    found = {}
    for file in out.glob("*-seed*/result.json"):
        with suppress(OSError, ValueError, LookupError, TypeError):  # it is just being replaced, or another program's
            result = json.loads(file.read_text())
            found |= {run: result for run, want in wanted.items() if result["settings"]["ablation"] >= want["ablation"]
                      and result["settings"] | {key: want[key] for key in ("out", "device", "ablation")} == want}
    return found


def execute(run):
    """One run. If it outlived a run_all.sh that was killed, it holds the lock: wait for its end, then look again."""
    began = time.perf_counter()
    with open(log[run], "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if run not in results():
            file.truncate(0)
            subprocess.run([sys.executable, "pkdgan.py", *command[run]], stdin=subprocess.DEVNULL, stdout=file,
                           stderr=file, env=os.environ | {"OMP_NUM_THREADS": str(max(1, cores // jobs))})
    result, now = results().get(run), time.perf_counter()
    done.append(run)
    n, of = len(done), len(todo)
    print(f"[{n}/{of}] {log[run].stem}:", f"step 2 {result['auroc']['step2']:.2f} %" if result else "FAILED",
          f"in {now - began:.0f} s, {(now - start) / n * (of - n) / 60:.0f} min left", flush=True)


def row(name, group, keys, d):
    """A row of the table: the mean over the normal classes in group, mean ± std over the seeds that have them all."""
    cells = [name]
    for key in keys:
        over_seeds = [[auroc.get((d, n, s), {}).get(key) for n in group] for s in seeds]
        means = [mean(values) for values in over_seeds if None not in values]
        cells.append(f"{mean(means):{'+' * (key == 'gain')}.2f}" if means else "missing")
        cells[-1] += f" ± {stdev(means):.2f}" if len(means) > 1 else ""
    complete = sum(all((d, n, s) in auroc for n in group) for s in seeds)
    print("|", " | ".join(cells), f"| {complete} of {len(seeds)} |")


finished, done, start = results(), [], time.perf_counter()
if jobs > 0:
    todo = [run for run in mine if run not in finished]
    print(f"{len(mine)} runs, {len(mine) - len(todo)} of them finished before; logs in {out}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(execute, todo))  # an exception here cancels what has not begun
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
    finished = results()
auroc = {run: r["auroc"] | {"gain": r["auroc"]["step2"] - r["auroc"]["student_alone"]} for run, r in finished.items()}

for d in datasets if not in_array else ():
    have = {n: r for (of, n, s), r in finished.items() if of == d}
    keys = ["teacher", "student_alone", "step1", "step2", "gain"]
    keys += ["joint_only"] * any("joint_only" in auroc[run] for run in auroc if run[0] == d)
    ratio, *paper = PAPER.get(title[d].split("-")[0], ["not"])  # completes "(... in the paper)"
    print(f"\n| {title[d]} |", " | ".join(keys).replace("_", " "), "| seeds |\n|" + "---|" * (len(keys) + 2))
    for n in normals:
        row(n if n not in have or have[n]["normal"] == n else f"{n} {have[n]['normal']}", [n], keys, d)
    row("mean", normals, keys, d)
    if paper:
        print("| paper, mean of ten |", " | ".join(paper + [""] * (len(keys) + 1 - len(paper))), "|")
    for line in sorted({f"{r['split']} split, {r['device']}, torch {r['versions']['torch']}, FLOPs teacher : student "
                        f"{r['ratio']:.2f} : 1 ({ratio} in the paper)" for r in have.values()}):
        print("\nAUROC in %,", line)
if in_array:
    again = " ".join(f"{key}={shlex.quote(value)}" for key, value in (ask | {"JOBS": "0"}).items())
    print(f"the table, when every task has ended: {again} bash run_all.sh {shlex.join(flags)}")
missing = [run for run in mine if run not in finished]
for run in missing:
    last = log[run].read_text(errors="replace").split("\n")[-2:-1] if log[run].exists() else ["not started"]
    print(f"no result: {log[run].stem}:", *last, file=sys.stderr)
sys.exit(bool(missing))
EOF
