"""One router's live requests: admission, choice of replica, failover."""
