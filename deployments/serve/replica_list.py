"""Passes the list of running replicas from the handle that Ray Serve tells to the callback that asked for it."""

from collections.abc import Callable

ReplicasCallback = Callable[[frozenset[str]], None]

_watchers: dict[tuple[str, str], ReplicasCallback] = {}
_latest: dict[tuple[str, str], frozenset[str]] = {}


def watch_replicas(app_name: str, deployment_name: str, callback: ReplicasCallback) -> None:
    """Call `callback` with the ids of a deployment's running replicas: now if they are known, and on each change.

    Serve calls it on a thread of its own. A deployment has one callback; a later one replaces it.
    """
    _watchers[app_name, deployment_name] = callback
    latest = _latest.get((app_name, deployment_name))
    if latest is not None:
        callback(latest)


def tell_watcher(app_name: str, deployment_name: str, replica_ids: frozenset[str]) -> None:
    """Tell the callback that the ids have changed."""
    _latest[app_name, deployment_name] = replica_ids
    callback = _watchers.get((app_name, deployment_name))
    if callback is not None:
        callback(replica_ids)
