"""Real data: datasets as tensors, their preprocessing, and label noise as a versioned object."""

from tad_plugin.data.datasets import DataSplits, load_dataset
from tad_plugin.data.noise.label_files import human_labels, read_label_file
from tad_plugin.data.noise.spec import NoiseSpec, NoisyLabels
from tad_plugin.data.preprocessing import Preprocessing
from tad_plugin.data.sources import DATASETS

__all__ = [
    "DATASETS",
    "DataSplits",
    "NoiseSpec",
    "NoisyLabels",
    "Preprocessing",
    "human_labels",
    "load_dataset",
    "read_label_file",
]
