#!/usr/bin/env bash
# The table of tad_plugin/iwd/README.md: 1,000 CIFAR-10 images per class (100 of them held out), 40% symmetric noise,
# DM, IPC 10, 200 iterations, ConvNet-3 width 32. About 3 minutes on one CPU core per variant and seed.
#   bash reproduce/iwd_cifar10.sh [--dataset folder:PATH.zip] [--variants "noisy;iwd"] [--seeds 0,1,2]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
setup_env reproduce
cd "$REPOSITORY"
python reproduce/iwd_study.py "$@"
