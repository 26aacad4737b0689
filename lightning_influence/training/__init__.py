"""What the training run itself says about each example, without a pass of its own."""
