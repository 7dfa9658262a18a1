"""Files, settings, seeds, machine and progress bars. Knows nothing of distillation."""
