"""The report, the ranking, and what to do about it."""
