"""The fleet page and the description of the API, by real clicks and keys; test_chat_page.py has the chat page."""

import os
import re
import signal

import pytest
from live_server import Server, replica_pids
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.timeout(120)


def test_the_fleet_page_shows_a_replica_die_and_its_streams_move(page: Page, server: Server):
    """Eight streams, one of two replicas killed: its card says so, the streams end whole."""
    page.goto(f"{server.url}/fleet")
    expect(page.locator("#live")).to_have_text("live")
    expect(page.locator('.replica[data-state="serving"]')).to_have_count(2)
    streams = [
        server.openai.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "Count from 1 to 150."}], stream=True
        )
        for _ in range(8)
    ]
    for stream in streams:
        next(stream)
    os.kill(replica_pids()[0], signal.SIGKILL)
    expect(page.locator('.replica[data-state="gone"]')).to_have_count(1, timeout=10_000)
    expect(page.locator("#news")).to_contain_text("left")
    page.screenshot(path="test-results/fleet-a-replica-died.png")
    for stream in streams:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        assert text.endswith("149 150")
    expect(page.locator("#news")).to_contain_text(re.compile("streams? of replica .* goe?s? on elsewhere"))
    expect(page.locator('.replica[data-state="serving"]')).to_have_count(2, timeout=60_000)


def test_the_description_asks_no_other_server(page: Page, server: Server):
    """Swagger UI, from the server's own files; `page` fails on a request to anywhere else."""
    page.goto(f"{server.url}/docs")
    expect(page.get_by_text("/v1/chat/completions").first).to_be_visible()
