"""Sparse autoencoders of activations: train, judge, compare.

Axes: a ``row`` is one position of one prompt or one frame of an encoder; ``d_in`` the width of a
row; ``latent`` what the dictionary has, ``d_sae`` of them; ``active`` the pairs of a row and a
latent that is active there.
"""
