"""Scores of examples and of pairs, and what a query measures."""
