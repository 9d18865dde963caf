"""Readings of a run that leave it unchanged: lenses, attention, divergence, labels."""
