"""Memory of a sequence (caches, pages) and the choice of its next token."""
