"""Which tokens of which sequences run in a step, and who holds which page: plain Python, no tensors."""
