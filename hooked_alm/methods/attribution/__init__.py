"""Gradient scores of nodes and edges, and how far they can be trusted."""
