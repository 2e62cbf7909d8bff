"""The adapters that requests may name: where they come from, what they are, and how all routers know the same ones."""
