"""Whether the features in which two voices differ flip an answer."""
