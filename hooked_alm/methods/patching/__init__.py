"""Patches of nodes and of paths: donors, metrics, sweeps, and what they found."""
