"""Dictionaries side by side: what each is worth, and which of them agree."""
