"""The running server that commands talk to."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import httpx
import typer

from llm.errors import LLMError

UrlOption = Annotated[str, typer.Option(envvar="RAYLINE_URL", help="Address of the server.")]
KeyOption = Annotated[str | None, typer.Option(envvar="RAYLINE_API_KEY", help="API key, if the server asks for one.")]
DEFAULT_URL = "http://127.0.0.1:8000"


class ServerError(LLMError):
    """The server cannot be reached, or refuses."""


@contextmanager
def connect(url: str, api_key: str | None) -> Iterator[httpx.Client]:
    """A client of the server.

    Raises:
        ServerError: from within, in one line, where a request fails.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = httpx.Timeout(10, read=None)
    with httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=timeout) as client:
        try:
            yield client
        except httpx.ConnectError as error:
            raise ServerError(f"nothing answers at {url}; start a server with: rayline serve") from error
        except httpx.HTTPError as error:
            raise ServerError(f"{url}: {type(error).__name__}: {error}") from error


def check(response: httpx.Response) -> None:
    """Check that a request succeeded; for a stream, before any of it is read.

    Raises:
        ServerError: what the server says is wrong.
    """
    if response.is_success:
        return
    response.read()
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"HTTP {response.status_code}"
    if response.status_code == 401:
        message += "; give it with --api-key or RAYLINE_API_KEY"
    raise ServerError(message)


def get(client: httpx.Client, path: str) -> Any:
    """The JSON that a GET request returns.

    Raises:
        ServerError: the server refuses.
    """
    response = client.get(path)
    check(response)
    return response.json()
