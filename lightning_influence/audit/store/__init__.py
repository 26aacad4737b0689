"""The audit directory on disk."""
