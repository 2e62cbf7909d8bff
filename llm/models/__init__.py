"""The decoder, and how checkpoints and adapters are loaded into it."""
