"""Attacks on a waveform, the neurons that are sensitive to them, and defences.

Axes: ``sample`` of a clip; ``block`` a block on the way to the head, or of the audio encoder,
counted from 0; ``neuron`` one of the ``d_mlp`` of its MLP.
"""
