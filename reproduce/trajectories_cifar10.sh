#!/usr/bin/env bash
# MTT and DATM on CIFAR-10 (JPEG) at IPC 10 and 1, all arms: the first 1,000 training images per class (10% of them held
# out), all test images, 40% symmetric noise.
#   reproduce/trajectories_cifar10.sh cifar10-jpeg.zip [output folder]
# ConvNet-3 width 16. 5 experts of 13 epochs for each seed and kind of labels (batches of 64, rate 0.1, plain SGD),
# shared by both loops and both IPC. IPC 10: 40 updates, segments of one expert epoch from anywhere, 30 student steps, 2
# experts in IWD's second phase. IPC 1: 200 updates, segments that start in the first two epochs (as in the published
# settings: small sets match early epochs), 20 student steps, 5 experts in IWD's second phase. Settings were chosen on
# the clean arm of seed 100, which is in no table, by accuracy on 5,000 further training images. SEEDS, ARMS, BASELINES,
# IPC, NOISE and JOBS change what is run. About 3 CPU hours in all.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
images=$(realpath "${1:?an image folder or zip of CIFAR-10}")
out=${2:-runs/trajectories_cifar10}
arms=${ARMS:-clean,noisy,oracle,clean-then-distil,tad,iwd,tad+iwd}
common=(--dataset "folder:$images" --per_class 1000 --noise "${NOISE:-symmetric:0.4}" --width 16 --eval_epochs 300 --eval_runs 2 --candidates 1
  --shared "$out/shared" --seeds "${SEEDS:-3}" --jobs "${JOBS:-2}"
  --arms "$arms"
  --loop.lr_teacher 0.05 --loop.lr_lr 1e-6 --loop.expert_epochs 1
  --loop.experts '{"experts": 5, "epochs": 13, "batch_train": 64, "lr": 0.1, "rho": 0.0}')
# TAD leaves 10 samples of each class at both IPC, so that they share its experts.
methods=()
if [[ $arms == *tad* ]]; then methods+=('"tad": {"min_per_class": 10}'); fi
if [[ $arms == *iwd* ]]; then methods+=('"iwd": {"ess": 0.5}'); fi
if ((${#methods[@]})); then common+=(--methods "{$(IFS=,; echo "${methods[*]}")}"); fi
for baseline in ${BASELINES:-mtt datm}; do
  for ipc in ${IPC:-10 1}; do
    case $ipc in
      1) size=(--iterations 200 --lr_img 1000 --loop.syn_steps 20 --loop.max_start_epoch 2) range=(1 50) ;;
      *) size=(--iterations 40 --lr_img 3000 --loop.batch_syn 20 --loop.syn_steps 30 --loop.max_start_epoch 12 --loop.second_experts 2) range=(4 30) ;;
    esac
    own=()
    if [ "$baseline" = datm ]; then
      own=(--loop.min_start_epoch 0 --loop.current_max_start_epoch "${range[0]}" --loop.expansion_end_epoch "${range[1]}" --loop.lr_y 0.5 --loop.threshold 2.0)
    fi
    tad-plugin compare --baseline "$baseline" --ipc "$ipc" "${common[@]}" "${own[@]}" "${size[@]}" --out "$out/$baseline-ipc$ipc"
  done
done
