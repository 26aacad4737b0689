"""Block-diagonal approximations, a file each."""
