"""Several processes that run one model: the processes, and how they communicate."""
