"""Experts for trajectory matching: their training, their replay buffers, and the source of a run's experts."""
