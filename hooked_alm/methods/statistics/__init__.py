"""Intervals, tests, moments and similarities of what was measured."""
