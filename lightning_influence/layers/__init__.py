"""How one call of a torch function becomes rows ``[k, n, s, ·]``, and the algebra of rows."""
