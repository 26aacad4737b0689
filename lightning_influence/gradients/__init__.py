"""Every example's gradient, in passes over data that leave no trace."""
