"""Which heads of a decoder make a transcript go in circles, or out of nothing."""
