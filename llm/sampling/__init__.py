"""How the next token is drawn: the reference, the state that rows keep for it on a device, and grammars."""
