"""Where an application's record and its spools are."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from deployments.accounts_config import AccountsConfig
from llm.errors import ConfigError

_SQLITE = "sqlite:///"


@dataclass(frozen=True, slots=True)
class RecordPlace:
    """Where entries go. It travels to the routers, and is never shown: a URL may hold a password.

    Attributes:
        record: as `open_record` takes it; None for memory.
        spool: directory for the routers' spools; None where nothing is written.
    """

    record: str | None = None
    spool: str | None = None

    def __repr__(self) -> str:
        return f"RecordPlace(record={'…' if self.record else None}, spool={self.spool!r})"


def find_place(config: AccountsConfig) -> RecordPlace:
    """Where the configuration, and its environment variable, say that the record is. Paths become absolute, because
    workers run in other directories.

    Raises:
        ConfigError: the variable is empty, or two places are named.
    """
    record = config.record
    if config.record_env is not None:
        if record is not None:
            raise ConfigError("accounts: set only one of record and record_env")
        record = os.environ.get(config.record_env, "").strip()
        if not record:
            raise ConfigError(f"accounts.record_env: the environment variable {config.record_env} is empty")
    if record is None:
        return RecordPlace()
    if record.startswith(_SQLITE) and record != _SQLITE:
        path, mark, query = record.removeprefix(_SQLITE).partition("?")
        record = f"{_SQLITE}{Path(path).expanduser().absolute()}{mark}{query}"
    elif "://" not in record:
        if not record.endswith(".jsonl"):
            raise ConfigError(
                f"accounts.record: {record!r} is neither a file that ends in .jsonl nor the URL of a database, such as "
                "sqlite:///usage.db"
            )
        record = str(Path(record).expanduser().absolute())
    return RecordPlace(record, str(_spool(config, record)))


def _spool(config: AccountsConfig, record: str) -> Path:
    """Directory for the spools of this record alone, on every node."""
    if config.spool is not None:
        root = Path(config.spool)
    else:
        root = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state") / "rayline" / "usage"
    return root.expanduser().absolute() / hashlib.sha256(record.encode()).hexdigest()[:12]
