"""Whether the decoder's states tell, where it ends a transcript, that it is wrong."""
