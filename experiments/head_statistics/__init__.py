"""Norms of what every head puts out and writes, on multiple-choice questions."""
