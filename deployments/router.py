"""`Router`: everything between HTTP and the engine replicas. A plain class: it runs without Ray underneath."""

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from deployments.config import AppConfig
from deployments.engine_client import EngineClient, ReplicaLostError
from deployments.engine_factory import EngineInfo
from deployments.generation import GenerationGroup, Journal
from deployments.openai.errors import not_ready
from deployments.openai.prompts import PromptEncoder
from deployments.token_channel import TokenListener
from llm.models.registry import load_generation_defaults, resolve_model_path
from llm.serving.schemas import EngineStats, GenerationRequest
from llm.tokenization.hf_tokenizer import HFTokenizer

logger = logging.getLogger("ray.serve")

_DESCRIBE_RETRY_S = 0.5
_REPORT_LIFETIME_S = 10.0


@dataclass(slots=True)
class ReplicaReport:
    """Last state that a replica told."""

    stats: EngineStats
    received_at: float
    """By the monotonic clock."""


class Router:
    """Owns the tokenizer, the token channel and the journal of live requests.

    Make it on the event loop that it is to run on.

    Args:
        config: the application's configuration.
        client: the engine replicas.
        channel_host: address to listen on for tokens.

    Raises:
        CheckpointError, ConfigError: the tokenizer cannot be loaded; one line with the fix.
    """

    def __init__(self, config: AppConfig, client: EngineClient, channel_host: str = "127.0.0.1") -> None:
        directory = resolve_model_path(config.model)
        self.config = config
        self.tokenizer = HFTokenizer.from_pretrained(directory)
        self.defaults = load_generation_defaults(directory)
        self.started_at = int(time.time())
        self.info: EngineInfo | None = None
        self.reports: dict[str, ReplicaReport] = {}
        self._client = client
        self._executor = ThreadPoolExecutor(config.router.tokenizer_threads, thread_name_prefix="tokenizer")
        self._encoder: PromptEncoder | None = None
        self._listener = TokenListener(
            channel_host, config.token_channel.port, on_items=self._take_items, on_stats=self._take_stats
        )
        self.journal = Journal(client, self._listener.address, max_resumes=config.router.max_resumes)
        self._learning = asyncio.get_running_loop().create_task(self._learn())

    @property
    def is_ready(self) -> bool:
        """Whether an engine has told what it is."""
        return self.info is not None

    @property
    def encoder(self) -> PromptEncoder:
        """Makes engine requests of API requests.

        Raises:
            APIError: 503, no engine has told its limits yet.
        """
        if self._encoder is None:
            raise not_ready()
        return self._encoder

    def start(self, requests: Sequence[GenerationRequest]) -> GenerationGroup:
        """Begin to generate."""
        return self.journal.start(requests)

    async def wait_until_ready(self) -> EngineInfo:
        """Wait for the first engine."""
        await asyncio.shield(self._learning)
        assert self.info is not None, "learned above"
        return self.info

    def snapshot(self) -> dict[str, Any]:
        """State of this router and, as it last heard, of the replicas."""
        now = time.monotonic()
        return {
            "router": {
                "num_live": self.journal.num_live,
                "num_requests": self.journal.num_requests,
                "num_resumes": self.journal.num_resumes,
                "channel": asdict(self._listener.counters),
            },
            "replicas": {
                replica_id: {**asdict(report.stats), "age_s": round(now - report.received_at, 3)}
                for replica_id, report in self.reports.items()
                if now - report.received_at < _REPORT_LIFETIME_S
            },
        }

    def close(self) -> None:
        """Stop listening and end the threads."""
        self._learning.cancel()
        self._listener.close()
        self._executor.shutdown(wait=False)

    async def _learn(self) -> None:
        """Ask the engines what they are, until one answers."""
        while self.info is None:
            try:
                info = await self._client.describe()
            except ReplicaLostError:
                await asyncio.sleep(_DESCRIBE_RETRY_S)
                continue
            except Exception:
                logger.exception("the engine replicas cannot be asked what they are; trying again")
                await asyncio.sleep(_DESCRIBE_RETRY_S * 4)
                continue
            self._encoder = PromptEncoder(self.tokenizer, self.defaults, info, self.config.limits, self._executor)
            self.info = info

    def _take_items(self, items: list[Any]) -> None:
        self.journal.take_items(items)

    def _take_stats(self, replica_id: str, stats: EngineStats) -> None:
        now = time.monotonic()
        if replica_id not in self.reports:
            for other, report in list(self.reports.items()):
                if now - report.received_at > _REPORT_LIFETIME_S:
                    del self.reports[other]
        self.reports[replica_id] = ReplicaReport(stats, now)
