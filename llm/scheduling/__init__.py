"""Which tokens of which sequences run in a step, and which sequences hold which pages: plain Python, no tensors."""
