"""Neurons of MLPs: how they are active for items of several classes, and what they do.

Axes: ``cls`` a class of items; ``block`` a block on the way to the head, counted from 0; ``neuron``
one of the ``d_mlp`` of its MLP.
"""
