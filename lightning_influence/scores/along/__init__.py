"""Scores of pairs along the checkpoints of a run."""
