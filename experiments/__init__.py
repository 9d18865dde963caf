"""One question per folder; files, figures and tables live here."""
