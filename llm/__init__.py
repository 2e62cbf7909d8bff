"""The engine: models, attention, paged KV cache and continuous batching. Runs without Ray."""
