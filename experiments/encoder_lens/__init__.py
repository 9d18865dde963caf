"""At which depth of the encoder, and of the decoder, a transcript is settled."""
