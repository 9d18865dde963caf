"""What experiments ask about: clips, items, bundled models, readers of users' files."""
