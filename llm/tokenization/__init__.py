"""Text to token ids and back, also token by token."""
