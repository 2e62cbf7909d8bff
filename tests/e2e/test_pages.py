"""The chat page and the fleet page, by real clicks and keys."""

import os
import re
import signal
import socket

import pytest
from accessibility import serious_faults
from live_server import Server, replica_pids
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.timeout(120)


def open_chat(page: Page, server: Server) -> None:
    page.goto(server.url)
    expect(page.locator("#model")).to_have_text("demo")


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def test_a_question_is_answered_as_it_is_made(page: Page, server: Server):
    open_chat(page, server)
    page.get_by_role("button", name="What is 17 + 25?").click()
    answer = page.get_by_role("article", name="Answer")
    expect(answer.locator(".body")).to_have_text("42")
    expect(answer.locator(".stats")).to_have_text(re.compile(r"[\d.]+ s to the first token.* · \d+ tokens"))
    expect(page.locator("#title")).to_have_text("What is 17 + 25?")
    ask(page, "Spell 'river' backwards.")
    expect(page.get_by_role("article", name="Answer").nth(1).locator(".body")).to_contain_text("revir")


def test_stop_and_retry(page: Page, server: Server):
    open_chat(page, server)
    ask(page, "Count from 1 to 150.")
    answer = page.get_by_role("article", name="Answer")
    expect(answer.locator(".body")).to_contain_text("5")
    page.get_by_role("button", name="Stop").click()
    expect(answer.locator(".stats")).to_contain_text("stopped")
    cut = answer.locator(".body").inner_text()
    assert "150" not in cut
    server.wait_for(lambda: server.num_used_pages() == 0, what="the engine goes on after Stop")
    page.get_by_role("button", name="Retry").click()
    expect(answer.locator(".body")).to_contain_text("149", timeout=30_000)
    expect(answer.locator(".stats")).to_contain_text("tokens/s")
    expect(answer).to_have_count(1)


def test_escape_stops(page: Page, server: Server):
    open_chat(page, server)
    ask(page, "Count from 1 to 150.")
    expect(page.get_by_role("article", name="Answer").locator(".body")).to_contain_text("3")
    page.keyboard.press("Escape")
    expect(page.locator(".stats")).to_contain_text("stopped")


def test_conversations_stay_in_the_browser(page: Page, server: Server):
    open_chat(page, server)
    ask(page, "What is 2 + 2?")
    expect(page.locator(".stats")).to_be_visible()
    page.get_by_role("button", name="New conversation").click()
    ask(page, "What is 30 + 3?")
    expect(page.get_by_role("article", name="Answer").locator(".body")).to_have_text("33")
    page.reload()
    talks = page.locator("#talks .open")
    expect(talks).to_have_text(["What is 30 + 3?", "What is 2 + 2?"])
    talks.nth(1).click()
    expect(page.get_by_role("article", name="Answer").locator(".body")).to_have_text("4")
    page.get_by_role("button", name="Delete: What is 30 + 3?").click()
    expect(talks).to_have_count(1)


def test_settings_are_sent_and_errors_shown(page: Page, server: Server):
    open_chat(page, server)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Most tokens").fill("3")
    page.get_by_label("System prompt").fill("Be short.")
    page.get_by_role("button", name="Save").click()
    with page.expect_request("**/v1/chat/completions") as asked:
        ask(page, "Count from 1 to 40.")
    body = asked.value.post_data_json
    assert body["max_tokens"] == 3
    assert body["messages"][0] == {"role": "system", "content": "Be short."}
    expect(page.locator(".stats")).to_contain_text("3 tokens · cut at the limit")


def test_markdown_is_drawn_and_nothing_in_it_runs(page: Page, server: Server):
    open_chat(page, server)
    text = (
        "# Head\\n\\n**bold** `code` [link](https://example.org/)\\n\\n- one\\n- two\\n\\n"
        "```python\\nx = '<b>'\\n```\\n\\n"
        "| a | b |\\n|---|---|\\n| 1 | 2 |\\n\\n"
        "<img src=x onerror=alert(1)> [bad](javascript:alert(1))"
    )
    page.evaluate(f'document.querySelector("#log").replaceChildren(markdown("{text}"))')
    log = page.locator("#log")
    expect(log.locator("strong")).to_have_text("bold")
    expect(log.locator("li")).to_have_text(["one", "two"])
    expect(log.locator("pre code")).to_have_text("x = '<b>'")
    expect(log.locator("td")).to_have_text(["1", "2"])
    expect(log.locator("a")).to_have_attribute("href", "https://example.org/")
    expect(log.locator("img")).to_have_count(0)
    expect(log).to_contain_text("<img src=x onerror=alert(1)>")


def test_on_a_phone_and_in_the_dark(page: Page, server: Server):
    page.set_viewport_size({"width": 380, "height": 720})
    open_chat(page, server)
    expect(page.locator("#side")).not_to_be_visible()
    page.get_by_role("button", name="Conversations", exact=True).click()
    page.get_by_role("button", name="Dark or light").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.get_by_role("button", name="New conversation").click()
    ask(page, "What is 17 + 25?")
    expect(page.get_by_role("article", name="Answer").locator(".body")).to_have_text("42")
    assert page.evaluate("document.documentElement.scrollWidth") <= 380


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
    expect(page.locator("#events")).to_contain_text(re.compile("streams? of replica .* goe?s? on elsewhere"))
    expect(page.locator('.replica[data-state="serving"]')).to_have_count(2, timeout=60_000)
    check_what_survives_a_reload(page)


def check_what_survives_a_reload(page: Page) -> None:
    """The page has been told of the streams and of the replica's end by the router, not by what it saw itself."""
    page.reload()
    expect(page.locator("#departures .failure")).to_have_count(1)
    expect(page.locator("#departures .failure")).to_contain_text("died")
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
