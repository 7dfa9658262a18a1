#!/usr/bin/env bash
# The wheel as a user installs it: built from the source archive, in an environment of its own, used outside a checkout.
# Torch and the other requirements come from the active environment, so nothing is downloaded. Takes about a minute.
set -euo pipefail
unset PYTHONPATH
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

git -C "$repository" archive HEAD 2>/dev/null | tar -x -C "$work" --one-top-level=source ||
    cp -r "$repository" "$work/source"
(cd "$work/source" && python -c "from setuptools import build_meta; build_meta.build_sdist('$work')" >/dev/null)
mkdir "$work/unpacked"
tar -xf "$work"/tad_plugin-*.tar.gz -C "$work/unpacked" --strip-components=1
(cd "$work/unpacked" && python -c "from setuptools import build_meta; build_meta.build_wheel('$work')" >/dev/null)

python -m venv --without-pip "$work/environment"
own="$("$work/environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
python -m pip --disable-pip-version-check --python "$work/environment/bin/python" \
    install --quiet --no-deps --no-index "$work"/tad_plugin-*.whl
# after the wheel's own place, so that the wheel is found first
python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$own/requirements.pth"

cd "$work"
PATH="$work/environment/bin:$PATH"
python - "$own" <<'PYTHON'
import sys
from importlib.metadata import version

import tad_plugin

assert tad_plugin.__file__.startswith(sys.argv[1]), tad_plugin.__file__
assert version("tad_plugin") == tad_plugin.__version__
PYTHON
tad-plugin --version
tad-plugin methods
for name in dm mtt datm idm; do
    mkdir "$name"
    tad-plugin patch status "$name" "$name" && found=0 || found=$?
    [ "$found" -le 2 ] # a named answer: an empty folder is no checkout
done
python - "$work/unpacked/README.md" <<'PYTHON'
import re
import sys
from pathlib import Path

blocks = re.findall(r"<!-- test -->\s*\n```python\n(.*?)^```", Path(sys.argv[1]).read_text(), re.DOTALL | re.MULTILINE)
assert len(blocks) >= 3
for number, block in enumerate(blocks, 1):
    exec(compile(block, f"README block {number}", "exec"), {"__name__": "__main__"})
    print(f"README block {number} of {len(blocks)} runs")
PYTHON
tad-plugin distill --dataset digits --noise symmetric:0.4 --arm noisy --per_class 16 --iterations 2 --eval_epochs 2 \
    --eval_runs 1 --width 4 --loop.batch_real 8 --ipc 1 --out run
tad-plugin export run --to distilled --format npz
python distilled/load.py
