"""The fleet page as it lies on the screen, with a fleet that has everything; test_pages.py has it with a real one."""

import itertools
import re
from collections.abc import Callable

import pytest
from accessibility import serious_faults
from fleet_sample import adapters, batches, events, own_usage, usage
from live_server import Server
from playwright.sync_api import Locator, Page, Route, expect

pytestmark = pytest.mark.timeout(240)

PARTS = "#totals, #latency, #charts, #models, #faults, #batches, #usage, #departures, #events"


def open_sample(page: Page, server: Server) -> None:
    """Open the page with the sample; what it asks for besides is answered by routes that a test has set before."""
    page.route("**/rayline/events", lambda route: route.fulfill(body=events(), content_type="text/event-stream"))
    page.goto(f"{server.url}/fleet")
    expect(page.locator(".replica")).to_have_count(5)


def test_it_says_what_there_is_to_know(page: Page, server: Server):
    route_overview(page, "admin", num_keys=3)
    open_sample(page, server)
    first, second, asleep = page.locator(".model").all()
    expect(first.get_by_role("heading", level=2)).to_have_text("meta-llama/Llama-3.3-70B-Instruct")
    expect(first.locator(".facts")).to_have_text(
        "1 replica serving, 1 to 4 allowed · also called gpt-4o · bfloat16 on CUDA · context of 131,072 tokens · "
        "0 tokens/s · 180 running · 12 waiting"
    )
    expect(first.locator(".scaling")).to_contain_text("The load asks for 3 replicas")
    expect(second.locator(".facts")).to_contain_text("2 of 3 replicas serving · float32 on CPU")
    expect(second.locator(".scaling")).to_be_hidden()
    expect(asleep.locator(".facts")).to_contain_text("asleep until the next request")
    expect(page.locator("#events li").nth(1)).to_contain_text("demo: Replica d4 joined")
    spread = first.locator('[data-id="a81kfj20"]')
    expect(spread.locator(".device")).to_have_count(8)
    expect(spread.locator(".device").nth(0)).to_contain_text("GPU 0")
    expect(spread.locator(".device").nth(0)).to_contain_text("100 of 140 GiB · 97 % busy")
    expect(spread.locator(".device").nth(2)).not_to_contain_text("busy")
    expect(spread.locator(".node")).to_have_text(
        re.compile("^gpu-node-1.cluster.example.internal · 8 . NVIDIA H200 · process 4711$")
    )
    expect(spread.locator(".streams b")).to_have_count(192)
    expect(spread.locator(".adapters")).to_have_text(re.compile("^Adapters: billing-answers, sql-.*, and 12 more$"))
    expect(second.locator('[data-id="d4"] .adapters')).to_be_hidden()
    expect(first.locator('[data-id="c0"] .why')).to_have_text("Its process ended suddenly: it was killed, or crashed")
    expect(second.locator('[data-id="d4"] .device')).to_contain_text("1.4 of 16 cores · 9.0 GiB")
    expect(second.locator('[data-id="older"] .node')).to_have_text("Node not known")
    tables = page.locator("#latency table")
    expect(tables.nth(0).get_by_role("row").nth(1)).to_have_text("First token (TTFT)87 ms412 ms2.31 s12k")
    expect(tables.nth(1).get_by_role("row").nth(2)).to_have_text("Token gap10 ms17 ms186 ms1.2M")
    expect(page.locator("#totals")).to_contain_text("Streams372", use_inner_text=False)
    written = page.evaluate(
        """async () => {
            const { duration } = await import("/static/fleet/format.js");
            return [0.0249, 0.0997, 0.412, 0.9998, 2.314, 99.97].map(duration);
        }"""
    )
    assert written == ["25 ms", "100 ms", "412 ms", "1000 ms", "2.31 s", "100 s"]
    expect(page.locator("#scope")).to_contain_text("Both routers are counted together")
    expect(page.locator("#departures li").nth(0)).to_contain_text("Seen on gpu-node-2 for 2.0 h")
    expect(page.locator("#departures .failure")).to_have_count(1)
    expect(page.locator("#charts .peak")).to_have_text(["peak 13k", "peak 359", "peak 190 ms"])
    # A gap in what is known is a gap in the curve.
    assert page.locator("#charts .line").nth(2).get_attribute("d").count("M") == 2


@pytest.mark.parametrize(("width", "height"), [(1200, 800), (768, 1024), (380, 720)])
def test_layout_and_accessibility(page: Page, server: Server, width: int, height: int):
    """The parts lie below each other and within the window, nothing sticks out of its box, cards do not overlap."""
    page.set_viewport_size({"width": width, "height": height})
    route_overview(page, "admin", num_keys=12)
    open_sample(page, server)
    expect(page.locator("#usage tbody tr")).to_have_count(25 + 12)
    expect(page.locator("#batches tbody tr")).to_have_count(4)
    page.locator(".model summary").click()
    for theme in ("light", "dark"):
        if page.evaluate("document.documentElement.dataset.theme") != theme:
            page.get_by_role("button", name="Dark or light").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        boxes = [part.bounding_box() for part in page.locator(PARTS).all()]
        for above, below in itertools.pairwise(boxes):
            assert above["y"] + above["height"] <= below["y"]
        assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)
        assert page.evaluate(STICKING_OUT) == []
        assert page.evaluate(OVERLAPPING) == []
        columns = {1200: 3, 768: 2, 380: 1}[width]
        first_model = page.locator(".replicas").nth(0).locator(".replica").all()
        assert len({card.bounding_box()["x"] for card in first_model}) == columns
        assert page.evaluate(SMALL_TARGETS) == []
        assert serious_faults(page) == []
        page.screenshot(path=f"test-results/fleet-{width}-{theme}.png", full_page=True)


STICKING_OUT = """() => [...document.querySelectorAll(
    ".replica, #totals div, .chart, table, #departures li")].flatMap((box) => {
    const outer = box.getBoundingClientRect();
    return [...box.querySelectorAll("*")].filter((part) => {
        const { left, right, top, bottom, width } = part.getBoundingClientRect();
        return width && part.tagName !== "CAPTION" && !part.closest("svg") &&
            (left < outer.left - 1 || right > outer.right + 1 || bottom > outer.bottom + 1);
    }).map((part) => part.outerHTML.slice(0, 100));
})"""
OVERLAPPING = """() => {
    const all = document.querySelectorAll(".replica, #totals div, .chart, #latency table");
    const boxes = [...all].map((box) => box.getBoundingClientRect());
    return boxes.flatMap((a, i) => boxes.slice(i + 1).filter((b) =>
        a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)).map(String);
}"""
SMALL_TARGETS = """() => [...document.querySelectorAll("button, a, select, input, summary")].filter((node) => {
    if (!node.checkVisibility()) return false;
    const { width, height } = node.getBoundingClientRect();
    return width < 40 || height < 40;
}).map((node) => node.outerHTML)"""


def route_overview(page: Page, role: str, num_keys: int = 500) -> list[str]:
    """Answer what the page asks besides its events; returns the paths that it asks, as it does."""
    asked: list[str] = []
    answers = {
        "**/v1/usage": own_usage(role),
        "**/rayline/usage?*": usage(num_keys),
        "**/v1/batches?*": batches("team-000", "team-000"),
        "**/rayline/batches?*": batches(*(f"team-{n:03}" for n in range(4))),
        "**/rayline/adapters": adapters(70),
    }

    def answering(answer: dict) -> Callable[[Route], None]:
        def fulfill(route: Route) -> None:
            asked.append(route.request.url.removeprefix("http://").partition("/")[2])
            route.fulfill(json=answer)

        return fulfill

    for pattern, answer in answers.items():
        page.route(pattern, answering(answer))
    return asked


def first_cells(table: Locator) -> list[str]:
    return table.locator("tbody th").all_inner_texts()


def test_administrators_see_usage_budgets_batches_and_adapters(page: Page, server: Server):
    """500 keys with two models each, 70 adapters: sorted, bounded, filtered, and by keyboard."""
    asked = route_overview(page, "admin")
    open_sample(page, server)
    used, keys, jobs = (
        page.get_by_role("region", name=name)
        for name in ("By key and model", "Keys and budgets", "Yours, and for administrators")
    )
    expect(used.locator("tbody tr")).to_have_count(50)
    expect(page.locator("#used")).to_contain_text("1,234 requests, 5,000,000 prompt tokens (7 from the prefix cache)")
    expect(used.locator("tbody tr").first).to_have_text("team-499embed:v2499499,000199,60049,9010")
    expect(page.locator("#usage-rows .note")).to_have_text("50 of 1,001 rows")
    page.locator("#usage-rows").get_by_role("button", name="Show 50 more").click()
    expect(used.locator("tbody tr")).to_have_count(100)
    used.get_by_role("button", name="Refused").focus()
    page.keyboard.press("Enter")
    expect(used.locator("tbody tr").first).to_have_text("nonenone000035rate_limit_exceeded 31insufficient_quota 4")
    used.get_by_role("button", name="Key").press("Enter")
    expect(used.get_by_role("columnheader", name="Key")).to_have_attribute("aria-sort", "ascending")
    assert first_cells(used)[:3] == ["none", "team-000", "team-000"]
    page.get_by_label("Filter: By key and model").fill("EMBED 49")
    expect(used.locator("tbody tr")).to_have_count(15)  # 49, 149, … 449 and 490 to 499
    expect(keys.locator("tbody tr").first).to_contain_text("team-499user2 of 1,000 left")
    expect(keys.locator("tbody tr").first.locator(".meter").first).to_have_attribute("aria-label", "100 % used")
    page.get_by_label("Filter: Keys and budgets").fill("admin")
    expect(keys.locator("tbody tr")).to_have_text(["team-000adminno limitno limitnever"])
    expect(jobs.locator("tbody tr")).to_have_count(4)
    expect(jobs.locator("tbody tr").nth(0)).to_contain_text("team-000chatin progress370 of 1,000, 5 failed1,002,345")
    expect(jobs.locator("tbody tr").nth(2)).to_contain_text("1 fault in its file")
    model = page.locator(".model").first
    expect(model.locator("summary")).to_have_text("70 adapters, 24 held by replicas")
    model.locator("summary").press("Enter")
    expect(model.locator("details tbody tr")).to_have_count(50)
    expect(model.locator("details tbody tr").first).to_contain_text("adapter-01 replicaconfiguration/srv/adapters/0/x")
    expect(page.locator(".model details")).to_have_count(1)
    expect(page.locator("#faults li")).to_contain_text("broken /srv/adapters/broken/adapter_model.safetensors cannot")
    page.get_by_label("Period of the usage").select_option("today")
    expect(page.locator("#used")).to_have_text(re.compile(r"^\d{4}-\d\d-\d\d in UTC"))
    day = page.locator("#used").inner_text()[:10]
    assert [path for path in asked if path.startswith("rayline/usage")][
        -1
    ] == f"rayline/usage?by=period&from={day}&to={day}"


def test_users_see_their_own_batches_alone(page: Page, server: Server):
    """And ask for nothing that they would be refused, which would stand in the browser's log."""
    asked = route_overview(page, "user")
    open_sample(page, server)
    expect(page.locator("#batches tbody tr")).to_have_count(2)
    expect(page.locator("#usage")).to_be_hidden()
    assert set(asked) == {"v1/usage", "v1/batches?limit=20"}


def test_usage_where_there_are_no_keys(page: Page, server: Server):
    """The real server, which keeps no batches: what was used without a key. Other tests may have been refused there."""
    assert server.ask() == "42"
    page.goto(f"{server.url}/fleet")
    rows = page.get_by_role("region", name="By key and model").locator("tbody tr")
    expect(rows.filter(has_text="demo")).to_have_text(re.compile(r"^nonedemo[\d,]+"))
    for hidden in ("#key-rows", "#batches", "#faults"):
        expect(page.locator(hidden)).to_be_hidden()
