"""Everything that touches Ray Serve."""
