"""Whether measures of where an encoder commits turn at the same depth."""
