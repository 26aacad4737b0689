"""Products with the curvature of all parameters together."""
