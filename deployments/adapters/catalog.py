"""`Catalog`: all adapters of an application, known in one place for all routers.

It follows the configuration's directories and folders itself. What administrators load and unload by request are
wishes: the catalog grants them, and every router remembers them. A catalog that restarts hears of them from the
routers. It grants nothing until they have had time to tell it.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deployments.adapters.directory import AdapterRules, created_at, read_adapter
from deployments.adapters.follower import AdapterFollower
from deployments.adapters.messages import (
    Ask,
    KnownAdapter,
    LoadOrder,
    OrderRefusal,
    Outcome,
    Reply,
    Source,
    Wish,
)
from deployments.adapters.roots import find_inside, why_outside
from deployments.adapters_config import check_client_name
from llm.errors import LLMError

logger = logging.getLogger("ray.serve")

RECOVERY_S = 3.0
"""Routers exchange with the catalog more often than this."""
_LOOK_INTERVAL_S = 1.0
_MAX_WISHES_NOT_LOADED = 1_000
_MAX_FAULTS_SHOWN = 100
_PRECEDENCE = {Source.CONFIGURED: 0, Source.REQUESTED: 1, Source.FOLDER: 2}
"""Of adapters with one name, the one from the first of these is served."""


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """One entry of `models` that takes adapters, as the catalog needs to know it.

    Attributes:
        key: the entry's key.
        name: the model's name, which several entries may share.
        entries: the configuration's adapters: paths or Hub ids by name.
        folder: the watched folder; None for none.
        roots: directories whose adapters administrators may load.
        most: most adapters to know.
        rules: what an adapter must be like.
    """

    key: str
    name: str
    entries: tuple[tuple[str, str], ...]
    folder: str | None
    roots: tuple[str, ...]
    most: int
    rules: AdapterRules


class Catalog:
    """Knows the adapters of all models of an application. Lives on one event loop.

    Args:
        models: the models that take adapters.
        taken_names: names and aliases of all models, which no adapter may have.
        recovery_s: how long it waits after its start for what routers know; 0 where it starts with its only router.
        clock: seconds; monotonic.
    """

    def __init__(
        self,
        models: Sequence[CatalogModel],
        taken_names: Iterable[str] = (),
        *,
        recovery_s: float = RECOVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._models = {model.key: model for model in models}
        self._taken_names = frozenset(taken_names)
        self._clock = clock
        self._recovers_until = clock() + recovery_s
        self._incarnation = uuid.uuid4().hex
        self._revision = 0
        self._wishes: dict[str, Wish] = {}
        self._followers = [_follower_of(model, self._taken_names) for model in models]
        self._shown: tuple[list[KnownAdapter], dict[str, str]] = [], {}
        self._is_all_shown = not models
        self._loading = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to follow the directories."""
        self._task = asyncio.get_running_loop().create_task(self._follow())

    def close(self) -> None:
        """Stop following."""
        if self._task is not None:
            self._task.cancel()

    @property
    def is_settled(self) -> bool:
        """See `Reply`."""
        return self._has_recovered and self._is_all_shown

    def exchange(self, ask: Ask) -> Reply:
        """Take in what a router remembers, and tell it what it has not heard of."""
        for wish in ask.wishes:
            self._note(wish)
        if ask.incarnation == self._incarnation and ask.revision == self._revision:
            return Reply(self._incarnation, self._revision, self.is_settled)
        adapters, faults = self._shown
        return Reply(
            self._incarnation, self._revision, self.is_settled, adapters, list(self._wishes.values()),
            dict(list(faults.items())[:_MAX_FAULTS_SHOWN]),
        )  # fmt: skip

    async def load(self, order: LoadOrder) -> Outcome:
        """Check an adapter and let requests name it. One order at a time."""
        async with self._loading:
            models = self._models_for(order.model)
            if isinstance(models, OrderRefusal):
                return Outcome(models)
            refusal = self._why_not(order, models)
            if refusal is not None:
                return Outcome(refusal)
            adapters = []
            for model in models:
                adapter = await asyncio.to_thread(_read, order, model)
                if isinstance(adapter, OrderRefusal):
                    return Outcome(adapter)
                adapters.append(adapter)
            logger.info("adapter %s of model %s is loaded by request: %s", order.name, models[0].name, adapters[0].path)
            return Outcome(wish=self._grant(order.name, adapters))

    async def unload(self, name: str) -> Outcome:
        """Let requests no longer name an adapter that was loaded by request; those that run are not affected."""
        async with self._loading:
            if not self._has_recovered:
                return Outcome(_early())
            known = self._find(name)
            if known is None:
                return Outcome(OrderRefusal(f"The adapter {name[:100]!r} cannot be found", "lora_name", True))
            if known.source is not Source.REQUESTED:
                return Outcome(_of_other_source(known))
            logger.info("adapter %s of model %s is unloaded by request", name, known.key)
            return Outcome(wish=self._grant(name, []))

    @property
    def _has_recovered(self) -> bool:
        return self._clock() >= self._recovers_until

    def _find(self, name: str) -> KnownAdapter | None:
        return next((adapter for adapter in self._shown[0] if adapter.name == name), None)

    def _models_for(self, name: str | None) -> list[CatalogModel] | OrderRefusal:
        """The entries of the model that an order is for."""
        names = list(dict.fromkeys(model.name for model in self._models.values()))
        if name is None and len(names) > 1:
            return OrderRefusal(f"model: name the one that the adapter is for: {', '.join(names)}", "model")
        found = [model for model in self._models.values() if name in (None, model.name)]
        return found or OrderRefusal(f"The model {(name or '')[:100]!r} takes no adapters", "model")

    def _why_not(self, order: LoadOrder, models: Sequence[CatalogModel]) -> OrderRefusal | None:
        """Why a name cannot be given to an adapter."""
        if not self._has_recovered:
            return _early()
        try:
            check_client_name(order.name)
        except ValueError as error:
            return OrderRefusal(f"lora_name: {error}", "lora_name")
        if order.name in self._taken_names:
            return OrderRefusal(f"lora_name: {order.name!r} is a model; give the adapter another name", "lora_name")
        known = self._find(order.name)
        if known is None:
            return self._why_no_more(models)
        if known.source is not Source.REQUESTED:
            return _of_other_source(known)
        if self._models[known.key].name != models[0].name:
            owner = self._models[known.key].name
            return OrderRefusal(f"lora_name: {owner} has an adapter of this name; unload that first", "lora_name")
        if not order.replaces:
            message = f"The adapter {order.name!r} has already been loaded; to replace it, set load_inplace to true"
            return OrderRefusal(message, "lora_name")
        return None

    def _why_no_more(self, models: Sequence[CatalogModel]) -> OrderRefusal | None:
        for model in models:
            if sum(adapter.key == model.key for adapter in self._shown[0]) >= model.most:
                message = f"There are {model.most} adapters already; unload one, or raise max_known_adapters"
                return OrderRefusal(message, "lora_name")
        return None

    def _grant(self, name: str, adapters: list[KnownAdapter]) -> Wish:
        """Let a new wish hold."""
        last = max((wish.number for wish in self._wishes.values()), default=0)
        wish = Wish(name, max(last + 1, time.time_ns() // 1000), adapters)
        self._note(wish)
        return wish

    def _note(self, wish: Wish) -> None:
        """Let a wish hold unless a later one of its name does."""
        known = self._wishes.get(wish.name)
        if known is not None and known.number >= wish.number:
            return
        self._wishes[wish.name] = wish
        ended = sorted((wish for wish in self._wishes.values() if not wish.adapters), key=lambda wish: wish.number)
        for old in ended[:-_MAX_WISHES_NOT_LOADED]:
            del self._wishes[old.name]
        self._revision += 1
        self._show()

    async def _follow(self) -> None:
        while True:
            is_more = False
            for follower in self._followers:
                try:
                    is_more |= await asyncio.to_thread(follower.look)
                except Exception:
                    logger.exception("the directories of adapters cannot be looked at; trying again")
            self._show()
            if not is_more:
                await asyncio.sleep(_LOOK_INTERVAL_S)

    def _show(self) -> None:
        """Put together what routers are told, and count a change."""
        # Asked first: what a follower finds in its thread meanwhile is shown the next time.
        is_all_shown = all(follower.is_settled for follower in self._followers)
        adapters = [adapter for wish in self._wishes.values() for adapter in wish.adapters]
        adapters = [adapter for adapter in adapters if adapter.key in self._models]
        for follower in self._followers:
            adapters += list(follower.found.values())
        owners: dict[str, KnownAdapter] = {}
        shown: dict[tuple[str, str], KnownAdapter] = {}
        faults: dict[str, str] = {}
        for adapter in sorted(adapters, key=lambda adapter: _PRECEDENCE[adapter.source]):
            owner = owners.setdefault(adapter.name, adapter)
            is_same_model = self._models[owner.key].name == self._models[adapter.key].name
            if is_same_model and (adapter.name, adapter.key) not in shown:
                shown[adapter.name, adapter.key] = adapter
            else:
                faults[adapter.name] = f"{adapter.path} is not served, because {owner.path} has the same name"
        for follower in self._followers:
            faults.update(follower.faults)
        if (list(shown.values()), faults) != self._shown:
            self._shown = list(shown.values()), faults
            self._revision += 1
        self._is_all_shown = is_all_shown


def _follower_of(model: CatalogModel, taken_names: frozenset[str]) -> AdapterFollower:
    folder = Path(model.folder).expanduser() if model.folder is not None else None
    return AdapterFollower(
        model.key,
        dict(model.entries),
        folder,
        model.most,
        lambda directory: read_adapter(directory, model.rules),
        taken_names,
    )


def _read(order: LoadOrder, model: CatalogModel) -> KnownAdapter | OrderRefusal:
    """The adapter that an order names, checked for one entry of the model. Not for an event loop."""
    directory = find_inside(order.path, model.roots)
    if directory is None:
        return OrderRefusal(why_outside(order.path, model.roots), "lora_path")
    try:
        digest = read_adapter(directory, model.rules)
    except LLMError as error:
        return OrderRefusal(f"lora_path: {error}", "lora_path")
    return KnownAdapter(order.name, model.key, str(directory), digest, created_at(directory), Source.REQUESTED)


def _early() -> OrderRefusal:
    return OrderRefusal("The adapters are still being counted; try again in a few seconds", is_early=True)


def _of_other_source(known: KnownAdapter) -> OrderRefusal:
    place = (
        "the setting adapters" if known.source is Source.CONFIGURED else "the directory of this name in adapter_folder"
    )
    return OrderRefusal(f"The adapter {known.name!r} comes from {place}; change it there", "lora_name")
