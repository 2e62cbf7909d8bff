"""Drives a load from client processes: a closed loop, or an open one that never waits for answers.

Each process has a share of the requests, makes their bodies before the start and runs one event loop. The parent starts
them together, hands on what they report, and stops them: nothing that it prints delays a measurement.
"""

import asyncio
import gc
import multiprocessing
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import uvloop

from deployments.bench.client import Client, Target
from deployments.bench.prompts import BodyBuilder, TokenSource
from deployments.bench.records import RequestRecord
from deployments.bench.workload import PlannedRequest

_REPORT_EVERY_S = 0.25
_TICK_S = 0.01
_START_AFTER_S = 0.05
_POLL_S = 0.1
_SETUP_TIMEOUT_S = 600


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """A load, as each process is told of it.

    Attributes:
        target: the server.
        address: what `Target.resolve` returned.
        timeout_s: longest time for one answer.
        source: what prompts are made of.
        is_chat: whether requests go to `/chat/completions`.
        model: name of the served model.
        seed: seed of the prompts.
        options: further fields of each request.
        requests: the requests of this process, in order. All of them have an arrival (open loop) or none has.
        concurrency: requests at once in a closed loop.
    """

    target: Target
    address: str
    timeout_s: float
    source: TokenSource
    is_chat: bool
    model: str
    seed: int
    options: dict[str, Any]
    requests: tuple[PlannedRequest, ...]
    concurrency: int

    @property
    def is_open(self) -> bool:
        """Whether requests are sent when they are due, whatever the answers do."""
        return bool(self.requests) and self.requests[0].arrival_s is not None

    def shares(self, num_processes: int) -> "list[LoadSpec]":
        """The load split over processes: every n-th request, and as even a part of the concurrency as can be."""
        num_processes = min(num_processes, len(self.requests), len(self.requests) if self.is_open else self.concurrency)
        parts = [
            self.concurrency // num_processes + (i < self.concurrency % num_processes) for i in range(num_processes)
        ]
        return [
            replace(self, requests=self.requests[i::num_processes], concurrency=parts[i]) for i in range(num_processes)
        ]


@dataclass(frozen=True, slots=True)
class ClientStats:
    """What one client process used.

    Attributes:
        cpu_share: share of one core that it used, from the start to its last answer.
        loop_lags_s: how late a timer of 10 ms fired, each time.
    """

    cpu_share: float
    loop_lags_s: list[float]


@dataclass(slots=True)
class LoadResult:
    """The outcome of a load.

    Attributes:
        records: requests that ended, in order of their indices.
        started_s: start on the machine's monotonic clock; the records count from it.
        duration_s: from the start to the last end.
        clients: one for each process.
        is_interrupted: whether it was stopped by Ctrl-C; requests then in flight are in no record.
    """

    records: list[RequestRecord] = field(default_factory=list)
    started_s: float = 0.0
    duration_s: float = 0.0
    clients: list[ClientStats] = field(default_factory=list)
    is_interrupted: bool = False


class _Ready:
    """Says that a process has made its bodies."""


@dataclass(frozen=True, slots=True)
class _ClientHandle:
    """A client process, as its parent sees it. The parent sends it its share, then when to start; None stops it."""

    process: BaseProcess
    orders: Connection


async def warm_up(spec: LoadSpec, requests: Sequence[PlannedRequest]) -> list[RequestRecord]:
    """Send requests that are not measured, the first alone; stops after it if it fails."""
    builder = _builder(spec)
    client = Client(spec.target, spec.address, spec.timeout_s)
    records: list[RequestRecord] = []
    try:
        for batch in (requests[:1], requests[1:]):
            queue = iter(batch)

            async def drain(queue: Iterator[PlannedRequest] = queue) -> None:
                for request in queue:
                    records.append(await client.send(-1, builder.body(request), request.num_input_tokens))

            await asyncio.gather(*(drain() for _ in range(max(spec.concurrency, 1))))
            if not all(record.is_completed for record in records):
                break
    finally:
        client.close()
    return records


def run_load(
    spec: LoadSpec, num_processes: int, on_records: Callable[[list[RequestRecord]], None] = lambda _: None
) -> LoadResult:
    """Run a load to its end, or until Ctrl-C.

    Args:
        spec: the whole load.
        num_processes: client processes, at most one for each request (open loop) or concurrent request.
        on_records: called with requests that have just ended, a few times a second.

    Raises:
        RuntimeError: a client process died.
    """
    context = multiprocessing.get_context("spawn")
    clients: dict[Connection, _ClientHandle] = {}
    shares = spec.shares(num_processes)
    for _ in shares:
        # One pipe each way, for the client's event loop makes the one that it watches non-blocking.
        reports, to_report = context.Pipe(duplex=False)
        to_obey, orders = context.Pipe(duplex=False)
        process = context.Process(target=_client_process, args=(to_obey, to_report), daemon=True)
        process.start()
        to_report.close()
        to_obey.close()
        clients[reports] = _ClientHandle(process, orders)
    try:
        # Once all have been started: as arguments, each would have to be read before the next process is.
        for client, share in zip(clients.values(), shares, strict=True):
            with suppress(BrokenPipeError):  # the supervisor says which died
                client.orders.send(share)
        return _Supervisor(clients, on_records).run()
    finally:
        for reports, client in clients.items():
            client.orders.close()
            reports.close()
            client.process.join(timeout=5)
            if client.process.is_alive():
                client.process.terminate()


class _Supervisor:
    """Talks to the client processes from the start to the end of one load."""

    def __init__(
        self, clients: dict[Connection, _ClientHandle], on_records: Callable[[list[RequestRecord]], None]
    ) -> None:
        self._clients = clients
        self._on_records = on_records
        self._running = set(clients)
        self._num_ready = 0
        self._result = LoadResult()

    def run(self) -> LoadResult:
        """See `run_load`."""
        deadline = time.monotonic() + _SETUP_TIMEOUT_S
        started_at: float | None = None
        while self._running:
            try:
                for reports in wait(list(self._running), timeout=_POLL_S):
                    assert isinstance(reports, Connection)
                    self._take(reports)
                if started_at is None and self._num_ready == len(self._clients):
                    started_at = time.monotonic() + _START_AFTER_S
                    self._tell(started_at)
                elif started_at is None and time.monotonic() > deadline:
                    raise RuntimeError(f"the client processes were not ready within {_SETUP_TIMEOUT_S} s")
            except KeyboardInterrupt:
                if self._result.is_interrupted:
                    raise
                self._result.is_interrupted = True
                self._tell(None)
        records = self._result.records
        records.sort(key=lambda record: record.index)
        if started_at is not None:
            self._result.started_s = started_at
            is_whole = records and not self._result.is_interrupted
            self._result.duration_s = (
                max(record.ended_s for record in records) if is_whole else time.monotonic() - started_at
            )
        return self._result

    def _take(self, reports: Connection) -> None:
        try:
            message = reports.recv()
        except EOFError as error:
            if self._result.is_interrupted:  # Ctrl-C found it before it was ready
                self._running.discard(reports)
                return
            process = self._clients[reports].process
            process.join(timeout=5)
            code = process.exitcode
            raise RuntimeError(f"a client process died with exit code {code}; its error is above") from error
        if isinstance(message, _Ready):
            self._num_ready += 1
        elif isinstance(message, ClientStats):
            self._result.clients.append(message)
            self._running.discard(reports)
        else:
            self._result.records.extend(message)
            self._on_records(message)

    def _tell(self, start_at: float | None) -> None:
        """Tell all processes to start at that time, or with None to stop now."""
        for reports in self._running:
            self._clients[reports].orders.send(start_at)


def _client_process(orders: Connection, reports: Connection) -> None:
    """Body of a client process: take its share of the load, make ready, wait for the start, run, report."""
    # Ctrl-C reaches the whole process group; the parent tells this one what to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _raise_file_limit()
    spec: LoadSpec = orders.recv()
    builder = _builder(spec)
    bodies = [builder.body(request) for request in spec.requests]
    gc.freeze()
    reports.send(_Ready())
    start_at: float | None = orders.recv()
    stats = ClientStats(0.0, [])
    if start_at is not None:
        stats = uvloop.run(_ClientLoop(spec, bodies, orders, reports).run(start_at))
    reports.send(stats)


class _ClientLoop:
    """The event loop of a client process."""

    def __init__(self, spec: LoadSpec, bodies: list[bytes], orders: Connection, reports: Connection) -> None:
        self._spec = spec
        self._bodies = bodies
        self._orders = orders
        self._reports = reports
        self._client = Client(spec.target, spec.address, spec.timeout_s)
        self._start_at = 0.0
        self._is_over = asyncio.Event()
        self._ended: list[RequestRecord] = []
        self._lags_s: list[float] = []

    async def run(self, start_at: float) -> ClientStats:
        """Run the share until it is done or the parent says stop."""
        loop = asyncio.get_running_loop()
        self._start_at = start_at
        await asyncio.sleep(start_at - time.monotonic())
        cpu_before = time.process_time()
        reporter, ticker = asyncio.create_task(self._report()), asyncio.create_task(self._tick())
        work = asyncio.create_task(self._open_loop() if self._spec.is_open else self._closed_loop())
        loop.add_reader(self._orders.fileno(), work.cancel)
        await asyncio.wait([work])
        cpu_share = (time.process_time() - cpu_before) / (time.monotonic() - start_at)
        loop.remove_reader(self._orders.fileno())
        ticker.cancel()
        self._client.close()
        self._is_over.set()
        await reporter
        if not work.cancelled():
            work.result()
        return ClientStats(cpu_share, self._lags_s)

    async def _open_loop(self) -> None:
        """Send each request when it is due."""
        async with asyncio.TaskGroup() as group:
            for place, request in enumerate(self._spec.requests):
                assert request.arrival_s is not None
                # Again, for the loop's timers count whole milliseconds from a clock that it reads now and then.
                while (delay := self._start_at + request.arrival_s - time.monotonic()) > 0:
                    await asyncio.sleep(delay)
                group.create_task(self._send(place))

    async def _closed_loop(self) -> None:
        """Send a request when another one has ended; one that was refused is waited for as long as the server said."""
        places = iter(range(len(self._bodies)))

        async def caller() -> None:
            for place in places:
                record = await self._send(place)
                await asyncio.sleep(record.retry_after_s or 0.0)

        async with asyncio.TaskGroup() as group:
            for _ in range(self._spec.concurrency):
                group.create_task(caller())

    async def _send(self, place: int) -> RequestRecord:
        request = self._spec.requests[place]
        body, self._bodies[place] = self._bodies[place], b""
        record = await self._client.send(request.index, body, request.num_input_tokens)
        record.scheduled_s = request.arrival_s
        record.sent_s -= self._start_at
        record.ended_s -= self._start_at
        self._ended.append(record)
        return record

    async def _report(self) -> None:
        """Hand ended requests to the parent until the load is over. It uses a thread, because the pipe may be full."""
        is_over = False
        while not is_over:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._is_over.wait(), _REPORT_EVERY_S)
            is_over = self._is_over.is_set()
            batch, self._ended = self._ended, []
            if batch:
                await asyncio.to_thread(self._reports.send, batch)

    async def _tick(self) -> None:
        """Notice when this process cannot keep up."""
        while True:
            due = time.monotonic() + _TICK_S
            await asyncio.sleep(_TICK_S)
            self._lags_s.append(time.monotonic() - due)


def _builder(spec: LoadSpec) -> BodyBuilder:
    return BodyBuilder(spec.source, is_chat=spec.is_chat, model=spec.model, seed=spec.seed, options=spec.options)


def _raise_file_limit() -> None:
    """Allow as many open files as the system does: each stream in flight takes one, and the usual limit is 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS names a hard limit that it does not grant
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
