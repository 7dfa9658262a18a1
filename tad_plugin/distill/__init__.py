"""Bundled distillation loops: they follow the published algorithms and reach the methods through the hook."""
