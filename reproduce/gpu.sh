#!/usr/bin/env bash
# On a machine with a GPU and torch: runs the tests that need a GPU, the benchmark, and a few telling cells of full-size
# DM, as far as MINUTES reach (15 by default). Leaves JSON under reproduce/results/gpu/ (OUT names another folder).
#
#     bash reproduce/gpu.sh 15
#     DEVICE=cpu bash reproduce/gpu.sh 2        # tiny sizes on a CPU: checks the script itself
#
# Nothing is installed but the package itself, if it is missing. CIFAR-10 is used if it lies under ROOT (data by
# default); without it the cells run on digits. A part that does not finish in its share is stopped; what it wrote stays.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
MINUTES=${1:-15}
DEVICE=${DEVICE:-cuda}
OUT=${OUT:-reproduce/results/gpu}
ROOT=${ROOT:-data}
PYTHON=${PYTHON:-python}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
case $MINUTES in ''|*[!0-9]*|0) echo "usage: bash reproduce/gpu.sh MINUTES (a whole number of at least 1)" >&2; exit 2 ;; esac
if [ "$DEVICE" != cpu ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "expected a CUDA device, and torch finds none: use a GPU machine, or check the script with DEVICE=cpu" >&2
  exit 2
fi
"$PYTHON" -c 'import kornia, scipy, safetensors, filelock, jsonargparse, sklearn' 2>/dev/null || "$PYTHON" -m pip install -q -e '.[reproduce,test]'
mkdir -p "$OUT"
END=$((SECONDS + 60 * MINUTES))
FAILED=0

# part NAME PERCENT COMMAND...: runs a command for at most that share of the whole time, and never beyond its end.
part() {
  local name=$1 share=$((60 * MINUTES * $2 / 100)) left=$((END - SECONDS)) began=$SECONDS code=0
  shift 2
  [ "$left" -lt "$share" ] && share=$left
  if [ "$share" -lt 5 ]; then
    echo "$name: no time left"
    return
  fi
  timeout "$share" "$@" > "$OUT/$name.log" 2>&1 || code=$?
  printf '%s %s seconds, exit %s\n' "$name" $((SECONDS - began)) "$code" | tee -a "$OUT/parts.txt"
  [ "$code" = 0 ] || [ "$code" = 124 ] || FAILED=1
}

SPEED=(reproduce/benchmarks/speed.py --device "$DEVICE")
if [ "$DEVICE" = cpu ]; then
  SPEED+=(--width 8 --ipc 1 --batch_real 8 --per_class 16 --classes 3 --size 16 --repeats 1 --jobs 1 --expert_epochs 1 --eval_epochs 1)
  GROWTH=(--growth 5000/10)
  LOOPS=(--loops dm)
  DATA=digits SIZE=(--iterations 2 --width 4 --loop.batch_real 8 --eval_epochs 2 --eval_runs 1 --per_class 20)
  SCORER='{"epochs": 2, "width": 4}'
else
  GROWTH=()
  LOOPS=()
  DATA=digits SIZE=(--iterations 2000 --eval_runs 3)
  [ -d "$ROOT/cifar-10-batches-py" ] && DATA=cifar10
  SCORER='{}'
fi
: > "$OUT/parts.txt"
TESTS=(tests/test_devices.py -k cuda)
[ "$DEVICE" = cpu ] && TESTS=(tests/test_devices.py -k "evaluation and emulated")
part tests 10 "$PYTHON" -m pytest -q -p no:cacheprovider "${TESTS[@]}"
part speed-growth 10 "$PYTHON" "${SPEED[@]}" --tables e ${GROWTH[@]+"${GROWTH[@]}"} --out "$OUT/speed-growth.json"
part speed-loops 30 "$PYTHON" "${SPEED[@]}" --tables ab ${LOOPS[@]+"${LOOPS[@]}"} --out "$OUT/speed-loops.json"
part speed-rest 10 "$PYTHON" "${SPEED[@]}" --tables c --out "$OUT/speed-rest.json"
CELL=(-m tad_plugin.cli distill --dataset "$DATA" --noise symmetric:0.4 --ipc 10 --device "$DEVICE" "${SIZE[@]}")
[ "$DATA" = digits ] || CELL+=(--root "$ROOT")
for arm in noisy tad iwd tad+iwd; do
  METHODS="{}"
  case $arm in tad*) METHODS="{\"scorer\": $SCORER}" ;; esac
  part "dm-$arm" 10 "$PYTHON" "${CELL[@]}" --baseline dm --arm "$arm" --methods "$METHODS" --out "$OUT/runs/dm-$arm"
  [ -f "$OUT/runs/dm-$arm/results.json" ] && cp "$OUT/runs/dm-$arm/results.json" "$OUT/dm-$arm.json"
done
echo "written to $OUT"
exit $FAILED
