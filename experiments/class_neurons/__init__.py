"""Which neurons belong to a class, and what they do: see ``experiment``."""
