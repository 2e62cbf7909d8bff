"""`rayline chat`: a conversation in the terminal."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console

from deployments.cli.server import DEFAULT_URL, KeyOption, ServerError, UrlOption, check, connect, get

_HISTORY = Path("~/.rayline_history").expanduser()
_HELP = '''/new       forget the conversation          /system TEXT   set the system prompt
/set NAME VALUE   temperature, top_p, max_tokens or seed
/exit      leave (also Ctrl-D)              """            begin and end a message of several lines
Ctrl-C stops an answer.'''
_SETTINGS = {"temperature": float, "top_p": float, "max_tokens": int, "seed": int}


def chat(
    message: Annotated[str | None, typer.Argument(help="Ask this, print the answer and exit.")] = None,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
    model: Annotated[str | None, typer.Option(help="The model that answers; by default the first one.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="By default the model's own.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
) -> None:
    """Chat with a served model; answers appear as they are generated.

    rayline chat
    rayline chat "What is 17 + 25?"
    rayline chat --model large
    echo "Summarise: $(cat notes.txt)" | rayline chat -
    """
    console = Console(highlight=False)
    with connect(url, api_key) as client:
        model = model or str(get(client, "/v1/models")["data"][0]["id"])
        settings: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens}
        talk = _Talk(client, console, model, system, {k: v for k, v in settings.items() if v is not None})
        if message is not None:
            talk.ask(typer.get_text_stream("stdin").read() if message == "-" else message, with_stats=False)
            return
        console.print(f"[bold]{model}[/] at {url}. /help for help.", style="dim")
        for text in _messages(console):
            if text.startswith("/"):
                if not talk.obey(text):
                    return
            elif text:
                with contextlib.suppress(ServerError):
                    talk.ask(text)


class _Talk:
    """A conversation, with the client and the settings it uses."""

    def __init__(
        self, client: httpx.Client, console: Console, model: str, system: str | None, settings: dict[str, Any]
    ) -> None:
        self._client = client
        self._console = console
        self._model = model
        self._system = system
        self._settings = settings
        self._turns: list[dict[str, str]] = []

    def ask(self, text: str, *, with_stats: bool = True) -> None:
        """Send a message and print the answer as it arrives.

        Raises:
            ServerError: the server refuses, or the stream ends with an error.
        """
        system = [{"role": "system", "content": self._system}] if self._system else []
        messages = [*system, *self._turns, {"role": "user", "content": text}]
        body = {"model": self._model, "messages": messages, "stream": True,
                "stream_options": {"include_usage": True}, **self._settings}  # fmt: skip
        started, first_at, num_tokens, pieces = time.monotonic(), 0.0, 0, []
        is_thinking = False
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                check(response)
                for event in _events(response):
                    if "error" in event:
                        raise ServerError(event["error"]["message"])
                    num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
                    for choice in event["choices"]:
                        thought = choice["delta"].get("reasoning_content") or ""
                        piece = choice["delta"].get("content") or ""
                        first_at = first_at or (time.monotonic() if thought or piece else 0.0)
                        self._console.print(thought, end="", markup=False, soft_wrap=True, style="dim italic")
                        if piece and is_thinking:
                            self._console.print("\n")
                        is_thinking = bool(thought)
                        pieces.append(piece)
                        self._console.print(piece, end="", markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            self._console.print(" [dim](stopped)[/]", end="")
        except ServerError as error:
            self._console.print(f"[red]{error}[/]")
            raise
        self._console.print()
        self._turns += [{"role": "user", "content": text}, {"role": "assistant", "content": "".join(pieces)}]
        if with_stats and first_at and num_tokens > 1:
            rate = (num_tokens - 1) / max(time.monotonic() - first_at, 1e-3)
            self._console.print(
                f"{first_at - started:.2f} s to the first token, {rate:.0f} tokens/s, {num_tokens} tokens", style="dim"
            )

    def obey(self, text: str) -> bool:
        """Run the command of a line that begins with a slash; returns False to leave."""
        command, _, rest = text[1:].partition(" ")
        name, _, value = rest.partition(" ")
        match command:
            case "exit" | "quit" | "q":
                return False
            case "new":
                self._turns = []
            case "system":
                self._system = rest or None
            case "set" if name in _SETTINGS:
                try:
                    self._settings[name] = _SETTINGS[name](value)
                except ValueError:
                    self._console.print(f"[red]{name}: {value!r} is not a number[/]")
            case _:
                self._console.print(_HELP, style="dim", markup=False)
        return True


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[6:])


def _messages(console: Console) -> Iterator[str]:
    """The user's messages: one per line, or several lines between lines of three quotes."""
    with contextlib.suppress(ImportError, OSError):
        import readline  # gives input() editing and history

        with contextlib.suppress(FileNotFoundError):
            readline.read_history_file(_HISTORY)
        readline.set_history_length(1000)
    while True:
        try:
            text = input("> ")
            if text.strip() == '"""':
                lines = []
                while (line := input(". ")).strip() != '"""':
                    lines.append(line)
                text = "\n".join(lines)
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print()
            continue
        with contextlib.suppress(NameError, OSError):
            readline.write_history_file(_HISTORY)
        yield text.strip()
