"""What users of HookedTransformer expect of a model: names, tokens, weights, folding."""
