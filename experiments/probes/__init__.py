"""What held-out probes read off a model's states about a clip, at every depth."""
