"""Several processes that run one model: the processes, and what they tell each other."""
