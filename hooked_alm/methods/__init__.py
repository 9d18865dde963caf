"""Measurements built on hooks: tensors in and out, no files."""
