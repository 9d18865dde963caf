"""Where a clip's attributes are read in a model's depths, and how the answer gets at them."""
