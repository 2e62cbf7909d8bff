"""Keys and values of sequences, and the choice of the next token."""
