"""Whether an answer rests on the voice or on the instruction, and which parts carry either."""
