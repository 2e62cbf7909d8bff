"""The OpenAI HTTP API: wire schemas, routes, server-sent events, errors."""
