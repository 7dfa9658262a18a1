"""Verdicts on real samples that were made elsewhere: their files, and what they mean for a run."""
