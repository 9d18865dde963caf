"""Conversion of published checkpoints to a ``HookedALM``: a module per family, and shared rules.

Every tensor of a checkpoint is consumed or dropped with a written reason; every field of its config
is acted on, irrelevant for a written reason, or at its default. Anything else is one error.
"""

from .loading import load_model as load_model
