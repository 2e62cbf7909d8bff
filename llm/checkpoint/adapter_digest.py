"""The digest of an adapter: which adapter it is, whatever its name and wherever its files are."""

import hashlib
from pathlib import Path

from llm.errors import CheckpointError

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""The files of a PEFT adapter that decide what it computes."""
_DIGEST_BYTES = 16
_BLOCK_BYTES = 1 << 20


def adapter_digest(directory: str | Path) -> str:
    """The digest of the whole content of an adapter's files, in hexadecimal digits.

    Names and times do not count, so copies on several machines have the same digest. Every byte counts, unlike in
    `llm.checkpoint.fingerprint`: pages of the prefix cache are named by this digest, and adapters are small. It reads
    about a gigabyte a second.

    Raises:
        CheckpointError: a file is missing or cannot be read.
    """
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for name in ADAPTER_FILES:
        path = Path(directory) / name
        try:
            with path.open("rb") as file:
                num_bytes = 0
                content = hashlib.blake2b(digest_size=_DIGEST_BYTES)
                while block := file.read(_BLOCK_BYTES):
                    content.update(block)
                    num_bytes += len(block)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise CheckpointError(f"{path} cannot be read ({reason}); is {directory} a PEFT adapter?") from error
        digest.update(num_bytes.to_bytes(8, "little") + content.digest())
    return digest.hexdigest()
