"""Rows of any hook points on your clips, kept for probes and dictionaries."""
