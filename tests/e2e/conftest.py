"""A real browser, Debian's Chromium without a window."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

SHOTS = Path(__file__).parents[2] / "test-results"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

expect.set_options(timeout=20_000)  # on a busy machine that takes as long as it takes


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser a file, gone before other files: while it lives, Playwright's loop runs in the main thread."""
    if CHROMIUM is None:
        pytest.skip("needs chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A page that, as the other tabs of its window, may write no error to its console and ask nobody but its server."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    faults: list[str] = []
    context.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    context.on("weberror", lambda error: faults.append(str(error.error)))
    context.on("request", lambda asked: None if "127.0.0.1" in asked.url or asked.url.startswith(("data:", "blob:"))
               else faults.append(f"asked {asked.url}"))  # fmt: skip
    page = context.new_page()
    yield page
    SHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SHOTS / f"{request.node.name}.png")
    context.close()
    assert faults == []
