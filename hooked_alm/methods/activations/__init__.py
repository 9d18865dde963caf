"""Rows of any hook points at any spans, kept on disk: collect, write, read shuffled.

Axes: a ``row`` is one position of one prompt (or one frame of an encoder), ``width`` what a point
has there, heads side by side.
"""
