#!/usr/bin/env bash
# DC, DSA and IDM on CIFAR-10 (JPEG), all arms: the first 1,000 training images per class (10% of them held out), all
# test images, 40% symmetric noise, IPC 10.
#   reproduce/baselines_cifar10.sh cifar10-jpeg.zip [output folder]
# DC and DSA: ConvNet-3 width 16, 200 and 100 updates, starting from real images. IDM: width 32, 100 iterations; its
# networks train 5 steps of 64 images at a time.
# The learning rate of DC and DSA was chosen on the clean arm of seed 100, which is in no table. IWD uses the weights
# that its README advises for heavy noise.
# SEEDS, ARMS, BASELINES and JOBS change what is run. About 1 to 3 CPU minutes per run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
images=$(realpath "${1:?an image folder or zip of CIFAR-10}")
out=${2:-runs/baselines_cifar10}
arms=${ARMS:-clean,noisy,oracle,clean-then-distil,tad,iwd,tad+iwd}
common=(--dataset "folder:$images" --per_class 1000 --ipc 10 --noise symmetric:0.4 --loop.batch_real 64 --eval_runs 2 --candidates 1
  --shared "$out/shared" --seeds "${SEEDS:-3}" --jobs "${JOBS:-2}"
  --arms "$arms")
if [[ $arms == *iwd* ]]; then common+=(--methods '{"iwd": {"ess": 0.5}}'); fi
gradients=(--width 16 --loop.outer 10 --loop.inner 2 --loop.init real --lr_img 1.0 --eval_epochs 200)
for baseline in ${BASELINES:-dc dsa idm}; do
  case $baseline in
    idm) own=(--width 32 --iterations 100 --loop.train_steps 5 --loop.batch_train 64 --eval_epochs 100) ;;
    dsa) own=("${gradients[@]}" --iterations 100) ;;
    *) own=("${gradients[@]}" --iterations 200) ;;
  esac
  tad-plugin compare --baseline "$baseline" "${common[@]}" "${own[@]}" --out "$out/$baseline"
done
