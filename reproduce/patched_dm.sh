#!/usr/bin/env bash
# The public DM script (main_DM.py of DatasetCondensation, patched in a copy) and the bundled loop, side by side:
# CIFAR-10 (JPEG), the first 1,000 images per class, 40% symmetric noise, IPC 10, 200 iterations, ConvNet-3 width 32;
# noisy and TAD, 3 seeds.
#   bash reproduce/patched_dm.sh cifar10-jpeg.zip DatasetCondensation [--seeds 3] [--out FOLDER]
# The checkout (unmodified, at the patch's commit) is copied. Each seed has six runs: the script, the bundled loop, and
# the bundled loop from the script's start, each noisy and with TAD. A run takes 1.5 to 3 minutes on one idle CPU core.
# A second call continues with the missing runs. Tables: FOLDER/results.md and FOLDER/results.json (by default in
# runs/patched_dm).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
images=$(realpath "${1:?an image folder or zip of CIFAR-10: train/<class>/*, test/<class>/*}")
checkout=$(realpath "${2:?a checkout of DatasetCondensation}")
shift 2
setup_env reproduce
cd "$REPOSITORY"
python reproduce/patched_dm.py "$images" "$checkout" "$@"
