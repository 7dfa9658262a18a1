"""Pictures of runs and comparisons: PNG, SVG or PDF by the file's suffix."""

from tad_plugin.plots.comparison import plot_comparison
from tad_plugin.plots.synthetic import plot_synthetic
from tad_plugin.plots.trust import plot_loss_histogram, plot_trusted_space

__all__ = ["plot_comparison", "plot_loss_histogram", "plot_synthetic", "plot_trusted_space"]
