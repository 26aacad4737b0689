"""TracIn in flight: squared gradient norms read off training's own backward pass."""
