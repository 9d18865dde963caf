"""From a published checkpoint to a ``HookedALM``: one module per family, shared rules beside them.

Every tensor of a checkpoint is consumed or dropped with a written reason; every field of its config
is acted on, irrelevant for a written reason, or at its default. Anything else is one error.
"""

from .loading import load_model as load_model
