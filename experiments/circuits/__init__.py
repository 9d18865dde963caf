"""Which heads and paths carry the answer on minimal pairs."""
