"""Measurements. Each prints one JSON line a row and, at the end, a table."""
