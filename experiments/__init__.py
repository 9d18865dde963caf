"""One question per module; files, figures and tables live here."""
