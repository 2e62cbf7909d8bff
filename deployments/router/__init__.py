"""Live requests of one router: admission, choice of replica, failover."""
