"""`OpenRequests`: what open requests have used so far, in a file that outlives its process.

The file is mapped into memory, so that counting a token is a write to memory, and the kernel keeps what was written
when the process is killed. Each open request has a cell of fixed size: its count, and who it belongs to. The first cell
holds only a count: the number of the process's last entry.
"""

import errno
import logging
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger("ray.serve")

_CELL_BYTES = 2048
_FIRST_CELLS = 64
_HEAD = struct.Struct("<IQd")
"""Length of the content, 0 for a free cell; the count; when it last changed, in seconds since 1970."""
_COUNT = struct.Struct("<Qd")
_COUNT_OFFSET = _HEAD.size - _COUNT.size
MAX_CONTENT_BYTES = _CELL_BYTES - _HEAD.size


class OpenRequests:
    """The cells of one file. Only the methods here write to it.

    Args:
        path: the file, which is created.

    Raises:
        OSError: it cannot be created.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self._free: list[int] = []
        self._num_cells = 0
        self._map: mmap.mmap | None = None
        if not self._grow():
            os.close(self._fd)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._free.remove(0)

    def note_last(self, seq: int) -> None:
        """Note the number of the last entry."""
        self.note(0, seq, 0.0)

    def open(self, content: bytes, at: float) -> int | None:
        """Fill a cell, with a count of 0.

        Returns:
            The cell; None if the content is too long, or the disk is full.
        """
        if not self._free:
            self._grow()
        if not self._free or self._map is None or not 0 < len(content) <= MAX_CONTENT_BYTES:
            return None
        cell = self._free.pop()
        start = cell * _CELL_BYTES
        self._map[start + _HEAD.size : start + _HEAD.size + len(content)] = content
        _COUNT.pack_into(self._map, start + _COUNT_OFFSET, 0, at)
        struct.pack_into("<I", self._map, start, len(content))  # last: from now on the cell counts
        return cell

    def note(self, cell: int, count: int, at: float) -> None:
        """Set a cell's count."""
        assert self._map is not None, "there is a cell"
        _COUNT.pack_into(self._map, cell * _CELL_BYTES + _COUNT_OFFSET, count, at)

    def free(self, cell: int) -> None:
        """Empty a cell."""
        assert self._map is not None, "there is a cell"
        struct.pack_into("<I", self._map, cell * _CELL_BYTES, 0)
        self._free.append(cell)

    def close(self) -> None:
        """Close the file."""
        if self._map is not None:
            self._map.close()
            self._map = None
        os.close(self._fd)

    def _grow(self) -> bool:
        """Make twice as many cells, with blocks on the disk, because writing to a hole of a full disk would end the
        process; returns whether there is room."""
        num_cells = max(_FIRST_CELLS, 2 * self._num_cells)
        try:
            os.posix_fallocate(self._fd, 0, num_cells * _CELL_BYTES)
        except OSError as error:
            logger.warning("usage of some open requests would be lost if this router were killed: %s", error.strerror)
            return False
        if self._map is not None:
            self._map.close()
        self._map = mmap.mmap(self._fd, num_cells * _CELL_BYTES)
        self._free = [*range(num_cells - 1, self._num_cells - 1, -1), *self._free]
        self._num_cells = num_cells
        return True


def last_number(data: bytes) -> int:
    """What `note_last` noted last, from the content of a file; 0 for an empty one."""
    return int(_HEAD.unpack_from(data)[1]) if len(data) >= _HEAD.size else 0


def left_open(data: bytes) -> Iterator[tuple[bytes, int, float]]:
    """What a process that has ended left in its cells: each content, its count, and when that last changed."""
    for start in range(_CELL_BYTES, len(data) - _CELL_BYTES + 1, _CELL_BYTES):
        length, count, at = _HEAD.unpack_from(data, start)
        if 0 < length <= MAX_CONTENT_BYTES:
            yield data[start + _HEAD.size : start + _HEAD.size + length], count, at
