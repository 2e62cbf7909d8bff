"""OpenAI's API: completions, responses, embeddings."""
