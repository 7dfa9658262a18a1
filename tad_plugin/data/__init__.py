"""Real data: datasets as tensors, their preprocessing, label noise as a versioned object, and the synthetic set."""

from tad_plugin.data.datasets import DataSplits, load_dataset
from tad_plugin.data.noise.label_files import human_labels, read_label_file
from tad_plugin.data.noise.spec import NoiseSpec, NoisyLabels
from tad_plugin.data.preprocessing import Preprocessing
from tad_plugin.data.real import RealData
from tad_plugin.data.sources import DATASETS
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.utils.image_store import ImageStore

__all__ = [
    "DATASETS",
    "DataSplits",
    "ImageStore",
    "NoiseSpec",
    "NoisyLabels",
    "Preprocessing",
    "RealData",
    "SyntheticSet",
    "human_labels",
    "load_dataset",
    "read_label_file",
]
