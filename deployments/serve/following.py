"""`Following`: what deployments have in common that follow files for as long as they live."""

from collections.abc import Callable


class Following:
    """Ends what a deployment follows when Ray Serve lets go of the deployment."""

    _stop: Callable[[], None] | None = None

    def until_the_end(self, stop: Callable[[], None]) -> None:
        """Have something called once, at the end."""
        self._stop = stop

    def __del__(self) -> None:
        """Ray Serve calls this on the event loop, just before it ends the threads that files are read in; the garbage
        collector calls it again."""
        stop, self._stop = self._stop, None
        if stop is not None:
            stop()
