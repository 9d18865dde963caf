"""Which components of a recogniser put the word that context calls for over what is said."""
