# Sourced by quickstart.sh and tests/run.sh. `setup_env EXTRA...` prepares an environment with tad_plugin and the named
# extras (editable install) and puts it first on PATH.
#
# The active virtual environment is used. If there is none, .venv in the repository root is made once and reused. A
# stamp per extra inside the environment holds a hash of setup.cfg and pyproject.toml, so that pip runs only after one
# of them has changed.

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

_fail() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

# Prints the first Python >= 3.10 on PATH that can make virtual environments.
_find_python() {
    local name without_venv=""
    for name in python3 python3.13 python3.12 python3.11 python3.10 python3.14 python; do
        command -v "$name" >/dev/null 2>&1 || continue
        "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 || continue
        if "$name" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            echo "$name"
            return
        fi
        without_venv="$name"
    done
    if [ -n "$without_venv" ]; then
        _fail "Expected a Python with the modules venv and ensurepip, but got $without_venv without them. \
Install them (Debian, Ubuntu: apt install python3-venv), or activate a virtual environment first."
    fi
    _fail "Expected Python 3.10 or newer on PATH, but got $(python3 --version 2>/dev/null || echo none). \
Install one (python.org, your package manager, pyenv or conda), or activate a virtual environment that has it."
}

setup_env() {
    local environment="${VIRTUAL_ENV:-$REPOSITORY/.venv}" base extra digest missing=0 joined
    if [ -z "${VIRTUAL_ENV:-}" ]; then
        # check for pip too: an interrupted `venv` leaves a python without it
        if ! "$environment/bin/python" -c 'import pip' >/dev/null 2>&1; then
            base="$(_find_python)"
            echo "Making a virtual environment in $environment ($("$base" --version 2>&1))"
            "$base" -m venv --clear "$environment"
        fi
        export VIRTUAL_ENV="$environment"
    fi
    [ -x "$environment/bin/python" ] || _fail "Expected a Python at $environment/bin/python (VIRTUAL_ENV), but got none. \
Deactivate that environment or make it anew."
    "$environment/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        _fail "Expected Python 3.10 or newer in $environment, but got $("$environment/bin/python" --version 2>&1). \
Activate another environment, or deactivate it so that .venv is used."
    export PATH="$environment/bin:$PATH"

    # the repository's path is hashed too, because an editable install points at one checkout
    digest="$(cd "$REPOSITORY" && "$environment/bin/python" -c '
import hashlib, pathlib
parts = [pathlib.Path(name).read_bytes() for name in ("setup.cfg", "pyproject.toml")]
print(hashlib.sha256(b"\0".join([*parts, str(pathlib.Path.cwd()).encode()])).hexdigest())')"
    for extra in "$@"; do
        [ "$(cat "$environment/.tad_plugin/$extra" 2>/dev/null)" = "$digest" ] || missing=1
    done
    if [ "$missing" = 1 ]; then
        joined="$(IFS=,; echo "$*")"
        echo "Installing tad_plugin[$joined] into $environment (the first time this downloads PyTorch: some minutes)"
        (cd "$REPOSITORY" && "$environment/bin/python" -m pip install --disable-pip-version-check -e ".[$joined]") ||
            _fail "Expected pip to install tad_plugin[$joined], but got the failure above. \
Check the network and the disk space, then run the same command again."
        mkdir -p "$environment/.tad_plugin"
        for extra in "$@"; do
            echo "$digest" >"$environment/.tad_plugin/$extra"
        done
    fi
}
