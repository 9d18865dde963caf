"""What a run shows without being changed: lenses, attention, divergence, labels."""
