#!/usr/bin/env bash
# DM on CIFAR-10 (JPEG): the first 1,000 training images per class (10% of them held out), all test images, ConvNet-3
# width 32, IPC 10, 200 iterations.
#   reproduce/cifar10_1k.sh cifar10-jpeg.zip [cifar10n-labels.npz] [output folder]
# The zip is an image folder: train/<class>/*.jpg, test/<class>/*.jpg. If a CIFAR-10N label file is given, a second
# comparison uses the human labels `worse`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
images=$(realpath "${1:?an image folder or zip of CIFAR-10}")
labels=${2:-}
out=${3:-runs/cifar10_1k}
common=(--baseline dm --dataset "folder:$images" --per_class 1000 --ipc 10 --iterations 200 --width 32
  --loop.batch_real 64 --eval_epochs 300 --eval_runs 2 --candidates 1 --jobs "${JOBS:-2}" --seeds "${SEEDS:-3}")
arms=clean,noisy,oracle,loss-prune,clean-then-distil,tad
tad-plugin compare "${common[@]}" --noise symmetric:0.4 --arms "${ARMS:-$arms}" --out "$out/symmetric-0.4"
if [ -n "$labels" ]; then
  tad-plugin compare "${common[@]}" --noise human:worse --labels "$(realpath "$labels")" --arms "${HUMAN_ARMS:-$arms}" --out "$out/human-worse"
fi
