"""Experts for trajectory matching: their training, their replay buffers, and where a run gets them from."""
