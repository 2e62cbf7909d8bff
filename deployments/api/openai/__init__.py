"""OpenAI's API: answers, responses, embeddings."""
