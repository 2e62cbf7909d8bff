"""What the chat page's settings say of the key's usage: with a key that has budgets, and where there are no keys."""

import re

import pytest
from accessibility import serious_faults
from fleet_sample import own_usage
from live_server import Server
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.timeout(120)


def test_usage_and_budgets_of_a_key(page: Page, server: Server):
    page.route("**/v1/usage", lambda route: route.fulfill(json=own_usage("user")))
    page.goto(server.url)
    expect(page.locator("#model")).to_have_text("demo")
    page.set_viewport_size({"width": 380, "height": 720})
    page.get_by_role("button", name="Settings").press("Enter")
    usage = page.get_by_role("region", name="Usage of the key team-000")
    budget = usage.get_by_label(re.compile("^2,500 of 10,000 tokens left today; renewed on .*2030"))
    assert budget.evaluate("meter => [meter.value, meter.max]") == [7500, 10000]
    used = "requests · 3,400 prompt tokens (1,200 cached) · 560 output tokens"
    expect(usage.get_by_role("term")).to_have_text(["Today", "This month", "This month, chat", "This month, embed:v2"])
    expect(usage.get_by_role("definition")).to_have_text(
        [f"12 {used} · 3 refused", f"40,000 {used} · 3 refused", f"12 {used} · 3 refused", f"12 {used}"]
    )
    for theme in ("light", "dark"):
        page.evaluate("theme => { document.documentElement.dataset.theme = theme; }", theme)
        assert serious_faults(page) == []
        assert usage.evaluate("node => node.scrollWidth <= node.clientWidth")
        usage.screenshot(path=f"test-results/chat-usage-{theme}.png")


def test_usage_where_there_are_no_keys(page: Page, server: Server):
    """The real server: each request counts. Where the record is away the dialog says so, and works as ever."""
    page.goto(server.url)
    expect(page.locator("#model")).to_have_text("demo")
    page.get_by_role("button", name="Settings").click()
    usage = page.get_by_role("region", name="Usage", exact=True)
    today = usage.get_by_role("definition").first
    expect(today).to_have_text(re.compile(r"^[\d,]+ requests? ·"))
    before = int(today.inner_text().split()[0].replace(",", ""))
    page.keyboard.press("Escape")
    assert server.ask() == "42"
    page.get_by_role("button", name="Settings").click()
    expect(today).to_have_text(re.compile(rf"^{before + 1:,} requests? ·"))
    page.route("**/v1/usage", lambda route: route.fulfill(body="no JSON"))
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Settings").click()
    expect(usage).to_contain_text("It cannot be shown now: Unexpected token")
