#!/usr/bin/env bash
# DATM and MTT with experts that memorise the wrong labels: CIFAR-10 (JPEG), the first 1,000 training images per class
# (10% of them held out), all test images, 40% symmetric noise, IPC 10.
#   reproduce/long_experts_cifar10.sh cifar10-jpeg.zip [output folder]
# Settings are those of IPC 10 in trajectories_cifar10.sh, with two changes: ConvNet-3 width 32, and experts that
# overfit, as published ones do: 20 epochs, batches of 32, momentum 0.9, rate 0.02, no augmentation. On noisy labels
# such an expert is best after 8 epochs and then gets worse (45% -> 38% -> 32% after 8, 20 and 40 epochs with batches of
# 64, seed 100). TAD's pilot stops after 9 epochs, chosen by the quality of its division of seed 100's training data (6,
# 9, 13 tried). SEEDS, ARMS, BASELINES and JOBS change what is run. About 40 CPU minutes per seed for DATM.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
images=$(realpath "${1:?an image folder or zip of CIFAR-10}")
out=${2:-runs/long_experts_cifar10}
arms=${ARMS:-clean,noisy,oracle,clean-then-distil,tad}
common=(--dataset "folder:$images" --per_class 1000 --noise symmetric:0.4 --ipc 10 --width 32 --iterations 40 --lr_img 3000 --eval_epochs 300 --eval_runs 2
  --candidates 1 --shared "$out/shared" --seeds "${SEEDS:-3}" --jobs "${JOBS:-2}"
  --arms "$arms"
  --loop.syn_steps 30 --loop.batch_syn 20 --loop.lr_teacher 0.05 --loop.lr_lr 1e-6 --loop.expert_epochs 1 --loop.max_start_epoch 19
  --loop.experts '{"experts": 5, "epochs": 20, "batch_train": 32, "lr": 0.02, "momentum": 0.9, "augment": "none", "rho": 0.0, "pilot_epochs": 9}')
if [[ $arms == *iwd* ]]; then common+=(--methods '{"iwd": {"ess": 0.5}}'); fi
for baseline in ${BASELINES:-datm mtt}; do
  own=()
  if [ "$baseline" = datm ]; then
    own=(--loop.min_start_epoch 0 --loop.current_max_start_epoch 6 --loop.expansion_end_epoch 30 --loop.lr_y 0.5 --loop.threshold 2.0)
  fi
  tad-plugin compare --baseline "$baseline" "${common[@]}" "${own[@]}" --out "$out/$baseline"
done
