"""`python -m deployments.bench`: the same as `rayline bench`."""

from deployments.bench.command import app

if __name__ == "__main__":
    app()
