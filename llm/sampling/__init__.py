"""How the next token is drawn: the reference, what rows remember for it on a device, and grammars."""
