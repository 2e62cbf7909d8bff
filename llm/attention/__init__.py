"""One attention interface and its backends."""
