"""Messages to tokens and tokens to messages."""
