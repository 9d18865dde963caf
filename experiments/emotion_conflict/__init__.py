"""Where the voice's emotion loses against the instruction's."""
