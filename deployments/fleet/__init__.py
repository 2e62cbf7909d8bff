"""What one router knows of its replicas, and which one gets a request."""
