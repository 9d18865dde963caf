"""Pairs of clips that differ in one thing, accepted or rejected, and what exchanging them does."""
