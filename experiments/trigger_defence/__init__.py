"""Attacks on what a model hears, and neurons held against them: see ``experiment``."""
