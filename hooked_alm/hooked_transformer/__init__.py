"""HookedTransformer's surface over the model: names, tokens, weights, folding."""
