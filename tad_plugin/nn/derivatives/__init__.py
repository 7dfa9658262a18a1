"""Gradients of batches, per-sample derivatives, and curvature-vector products."""
