"""Ray Serve deployments: the router, the engine replicas and what passes between them."""
