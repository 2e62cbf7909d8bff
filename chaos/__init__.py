"""Faults on purpose: what must hold when replicas die, hang, leave and drown, tried on a real fleet on this machine."""
