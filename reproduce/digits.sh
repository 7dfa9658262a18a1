#!/usr/bin/env bash
# DM on digits, IPC 1 and 10, four kinds of noise: the tables in reproduce/results/digits-*.md.
# symmetric:0.4 has 5 noise seeds, the others have 3 (SEEDS=n sets all). About 5 to 10 minutes per kind on 2 idle CPU
# cores. Finished runs are kept; a second call continues.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-runs/digits}
for noise in symmetric:0.4 symmetric:0.2 asymmetric:0.4 pair:0.4; do
  seeds=3
  if [ "$noise" = symmetric:0.4 ]; then seeds=5; fi
  tad-plugin compare --baseline dm --dataset digits --noise "$noise" --ipc 1,10 \
    --arms clean,noisy,oracle,loss-prune,clean-then-distil,tad --seeds "${SEEDS:-$seeds}" --jobs "${JOBS:-2}" --out "$out/${noise/:/-}"
done
