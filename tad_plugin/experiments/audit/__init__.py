"""The audit of a dataset: a verdict on every sample, from networks that did not train on it."""
