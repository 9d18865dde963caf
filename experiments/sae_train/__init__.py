"""Sparse autoencoders of any hook points, and what they are worth."""
