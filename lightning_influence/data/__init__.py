"""Examples by index: fetched in any order, the same each time, and known again in a batch."""
