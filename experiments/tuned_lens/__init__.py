"""A trained translator per depth, and how far it is from the output."""
