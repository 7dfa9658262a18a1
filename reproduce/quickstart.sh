#!/usr/bin/env bash
# The main result in a few minutes on two CPU cores: DM on digits with 40% of the labels wrong. TAD is compared with
# clean labels, the unprotected baseline and its rivals. Further flags go to `tad-plugin compare`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
setup_env reproduce
cd "$REPOSITORY"

# one thread each, because two runs work side by side
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec tad-plugin compare \
    --baseline dm --dataset digits --noise symmetric:0.4 --ipc 1,10 \
    --arms clean,noisy,oracle,loss-prune,clean-then-distil,tad \
    --seeds 3 --jobs 2 --out runs/quickstart "$@"
