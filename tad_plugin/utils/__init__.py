"""Files, checkpoints, settings, seeds, worker processes, the machine and progress bars. Independent of distillation."""
