"""Parts that several families share: decoder rules, Whisper windows, perception parts."""
