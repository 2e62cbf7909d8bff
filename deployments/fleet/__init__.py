"""What one router knows about its replicas, and which replica gets a request."""
