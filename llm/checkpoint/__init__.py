"""Reading checkpoints: files of weights, configurations, adapters, generation defaults, the Hub."""
