"""Gradients, per-sample gradients and curvature products of networks."""
