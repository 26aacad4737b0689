"""What knows nothing of influence: processes, precision, memory, layouts, and what passes leave as it was."""
