#!/usr/bin/env bash
# Everything that must hold: lint, types, tests. Further arguments go to pytest: bash tests/run.sh tests/nn -k augment
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../reproduce/setup_env.sh"
setup_env reproduce test
cd "$REPOSITORY"

# as modules, so that they are the environment's own and not others on PATH
python -m ruff check .
python -m mypy tad_plugin
# two workers with one thread each: tensors are small here, and more threads only get in each other's way
OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 python -m pytest -q -n 2 "$@"
