"""LoRA adapters that are kept apart: which block's update does what."""
