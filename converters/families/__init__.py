"""Published checkpoints, one family a module; none knows of another."""
