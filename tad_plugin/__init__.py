"""tad_plugin: dataset distillation on imperfect real data, by trust (TAD) and influence (IWD)."""

__version__ = "0.1.0"
