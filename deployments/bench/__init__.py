"""`rayline bench`: load tests of any server with OpenAI's API."""
