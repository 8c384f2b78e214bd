#!/usr/bin/env bash
# MNIST, Fashion-MNIST and CIFAR-10, every normal class, one run after the other; stops at the first run that fails.
#   bash run_all.sh [any other flag of pkdgan.py]
#   DATASETS="mnist" NORMALS="0 1 2" bash run_all.sh --ablation
set -euo pipefail
cd "$(dirname "$0")"
for dataset in ${DATASETS:-mnist fmnist cifar10}; do
  for normal in ${NORMALS:-0 1 2 3 4 5 6 7 8 9}; do
    python pkdgan.py --dataset "$dataset" --normal "$normal" "$@"
  done
done
