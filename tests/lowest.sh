#!/usr/bin/env bash
# The suite under the oldest versions that setup.cfg allows: Python 3.10 and the lower bound of every requirement.
# Makes the environment .venv-lowest once (uv resolves the lower bounds; about 3 GB). Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

is_310() {
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10))' >/dev/null 2>&1
}

candidates=(python3.10 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.10.*/bin/python)
[ -z "${PYTHON310:-}" ] || candidates=("$PYTHON310")
python=""
for candidate in "${candidates[@]}"; do
    if is_310 "$candidate"; then
        python="$candidate"
        break
    fi
done
[ -n "$python" ] || {
    echo "error: Expected Python 3.10, but got none. Install it, or name it with PYTHON310=/path/to/python3.10." >&2
    exit 1
}

environment="${LOWEST_ENVIRONMENT:-.venv-lowest}"
digest="$(sha256sum setup.cfg | cut -d' ' -f1)"
if [ "$(cat "$environment/.digest" 2>/dev/null)" != "$digest" ]; then
    if [ -e "$environment" ] && [ ! -e "$environment/pyvenv.cfg" ]; then
        echo "error: Expected a virtual environment or nothing in $environment, but got other files." \
            "Name another place with LOWEST_ENVIRONMENT." >&2
        exit 1
    fi
    "$python" -m venv --clear "$environment"
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check uv
    "$environment/bin/python" -m uv pip install --python "$environment/bin/python" --resolution lowest-direct \
        -e '.[reproduce,test]'
    echo "$digest" >"$environment/.digest"
fi
# the linters' own oldest versions are of no interest: only the tests run
OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 exec "$environment/bin/python" -m pytest -q -n 2 "$@"
