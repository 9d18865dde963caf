"""Blocks of a LoRA adapter: which of them change the answer."""
