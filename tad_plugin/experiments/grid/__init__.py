"""Grids: whole ablations, from a YAML file to runs and a report."""
