"""The demo model: its tasks, its training data, its training and its evaluation."""
