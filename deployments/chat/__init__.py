"""Converts messages to tokens and tokens to messages."""
