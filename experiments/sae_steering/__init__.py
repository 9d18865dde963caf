"""What taking features of non-speech out of an encoder silences, and what it costs in words."""
