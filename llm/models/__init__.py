"""The decoder and its families of models."""
