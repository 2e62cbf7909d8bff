"""`KeyFile`: follows the keys in `api_keys_file` on the node of one router."""

import hashlib
import logging
from pathlib import Path

from deployments.router.keys import ApiKey, KeySource, parse_keys, read_file
from llm.errors import ConfigError

logger = logging.getLogger("ray.serve")


class KeyFile:
    """Reads a file with keys again and again. A faulty file changes no key.

    The whole content is compared, because modification times are coarse and a mounted secret changes through its links.
    New content counts once it has been seen twice, so that a half-written file revokes nothing.

    Args:
        source: the initial keys, and the file.

    Attributes:
        keys: the keys that are valid now, including the fixed ones.
        error: what is wrong with the file, in one line that quotes none of its content; None if nothing is wrong.
    """

    def __init__(self, source: KeySource) -> None:
        assert source.path is not None, "made for sources with a file"
        self.keys = source.keys
        self.error: str | None = None
        self._source = source
        self._path = Path(source.path)
        self._seen = b""
        self._taken = b""

    def look(self, *, is_first: bool = False) -> tuple[ApiKey, ...] | None:
        """Read the file, which may block; returns the keys if they have changed.

        Args:
            is_first: accept the content at once.
        """
        try:
            content = read_file(self._path)
            seen = hashlib.sha256(content).digest()
            is_settled, self._seen = is_first or seen == self._seen, seen
            if seen == self._taken:
                self._note(None)
            elif is_settled:
                keys = self._source.keys_with(parse_keys(self._path, content, self._source.defaults))
                self._note(None)
                self._taken = seen
                if keys != self.keys:
                    self.keys = keys
                    return keys
        except ConfigError as error:
            self._note(str(error))
        return None

    def _note(self, error: str | None) -> None:
        """Log once that something is wrong, or no longer wrong."""
        if error is not None and error != self.error:
            logger.error("%s; the API keys stay as they are", error)
        elif error is None and self.error is not None:
            logger.info("api_keys_file %s can be read again", self._path)
        self.error = error
