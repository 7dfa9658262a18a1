#!/usr/bin/env bash
# Digits, DM, IPC 1 and 10, 5 noise seeds, four kinds of noise: the tables in reproduce/results/digits-*.md.
# About 15 minutes per kind on 2 CPU cores. Runs that are finished are kept; a second call goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-runs/digits}
for noise in symmetric:0.4 symmetric:0.2 asymmetric:0.4 pair:0.4; do
  tad-plugin compare --baseline dm --dataset digits --noise "$noise" --ipc 1,10 \
    --arms clean,noisy,oracle,loss-prune,clean-then-distil,tad --seeds 5 --jobs "${JOBS:-2}" --out "$out/${noise/:/-}"
done
