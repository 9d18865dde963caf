"""Command line, run folder, figures and report."""
