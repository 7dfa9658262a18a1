"""Draws the picture of README.md: synthetic digits, one per class, without the plugin and with TAD. Takes seconds.

    tad-plugin compare --dataset digits --noise symmetric:0.4 --ipc 1 --arms noisy,tad --seeds 1 --iterations 60 \\
        --width 16 --out runs/picture
    python reproduce/readme_picture.py runs/picture
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.experiments.report.synthetic import plot_arms

PICTURE = Path(__file__).resolve().parent / "results" / "digits-noisy-tad.png"
ARMS = {"noisy": "without the plugin", "tad": "with TAD"}


def main() -> None:
    """Draws the sets of a comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", help="--out of the comparison")
    runs, sets = Path(parser.parse_args().runs), {}
    for arm, title in ARMS.items():
        synthetic = SyntheticSet.load(runs / arm / "ipc1" / "seed0" / "synthetic.safetensors")
        sets[title] = synthetic.preprocessing.inverse(synthetic.images), synthetic.hard_labels
    print(plot_arms(sets, PICTURE, class_names=list(synthetic.class_names) or [str(c) for c in range(10)]))


if __name__ == "__main__":
    main()
