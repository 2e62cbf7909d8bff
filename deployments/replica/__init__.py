"""One engine and the thread that runs it."""
