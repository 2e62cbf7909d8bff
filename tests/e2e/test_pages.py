"""The fleet page and the description of the API, by real clicks and keys; test_chat_page.py has the chat page."""

import os
import re
import signal
import socket

import pytest
from accessibility import serious_faults
from live_server import Server, replica_pids
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.timeout(240)


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
    gone = page.locator('.replica[data-state="gone"]')
    expect(gone).to_have_count(1, timeout=10_000)
    why = "its process ended suddenly: it was killed, or crashed"
    expect(gone.locator(".why")).to_have_text(why[0].upper() + why[1:])
    expect(page.locator("#events")).to_contain_text(re.compile(f"Replica .* was lost: {why}"))
    page.screenshot(path="test-results/fleet-a-replica-died.png", full_page=True)
    for stream in streams:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        assert text.endswith("149 150")
    expect(page.locator("#events")).to_contain_text(re.compile("streams? of replica .* continues? elsewhere"))
    expect(page.locator('.replica[data-state="serving"]')).to_have_count(2, timeout=60_000)
    check_what_survives_a_reload(page)


def check_what_survives_a_reload(page: Page) -> None:
    """The page has been told of the streams and of the replica's end by the router, not by what it saw itself."""
    page.reload()
    expect(page.locator("#departures .failure").first).to_contain_text("died")
    expect(page.locator("#events")).to_contain_text("was lost")
    quarter_hour = page.locator("#latency table").nth(1).get_by_role("row")
    for row in (1, 2):
        expect(quarter_hour.nth(row)).to_have_text(re.compile(r"(\d+(\.\d+)? m?s){3}[\d,k]+$"))
    assert page.locator("#charts .line").nth(0).get_attribute("d").count(" L") > 2
    device = page.locator('.replica[data-state="serving"] .device').first
    expect(device).to_have_text(re.compile(r"CPU[\d.]+ of \d+ cores? · \d+(\.\d)? [MG]iB"))
    expect(page.locator(".replica .node").first).to_contain_text(f"{socket.gethostname()} · process ")
    assert serious_faults(page) == []


def test_the_description_asks_no_other_server(page: Page, server: Server):
    """Swagger UI, from the server's own files; `page` fails on a request to anywhere else."""
    page.goto(f"{server.url}/docs")
    expect(page.get_by_text("/v1/chat/completions").first).to_be_visible()
    page.locator("#operations-default-ready_ready_get").get_by_role("button").first.click()
    page.get_by_role("button", name="Try it out").click()
    page.get_by_role("button", name="Execute").click()
    expect(page.locator(".live-responses-table .response-col_status").last).to_contain_text("200")
    assert serious_faults(page) == []
