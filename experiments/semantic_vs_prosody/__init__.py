"""Words and voice disagree: which wins, and at which depth."""
