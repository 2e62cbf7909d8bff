"""The chat page, by real clicks and keys."""

import json
import re
from pathlib import Path

import pytest
from accessibility import serious_faults
from live_server import Server
from playwright.sync_api import Download, Locator, Page, Route, expect

pytestmark = pytest.mark.timeout(120)

SHOTS = Path(__file__).parents[2] / "test-results"
SAMPLE = Path(__file__).parent / "conversation.json"
SAMPLE_TITLE = "Everything that an answer may hold"
MIN_TARGET_PX = 40


def open_chat(page: Page, server: Server) -> None:
    page.goto(server.url)
    expect(page.locator("#model")).to_have_text("demo")


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answers(page: Page) -> Locator:
    return page.get_by_role("article", name="Answer")


def body(page: Page) -> Locator:
    """The text of the last answer."""
    return answers(page).last.locator("> .body")


def last_number(text: str) -> int:
    """The last number of an answer that counts; it may be cut in its middle."""
    return int(text.split()[-1])


def goes_on(page: Page, cut: str) -> None:
    """Go on with an answer that counts."""
    page.get_by_role("button", name="Continue").click()
    expect(body(page)).to_contain_text(f" {last_number(cut) + 5} ")
    assert body(page).inner_text().startswith(cut.strip())


def listed(page: Page) -> Locator:
    """The titles in the list of conversations."""
    return page.locator("#conversations .name")


def choose(page: Page, title: str, command: str) -> None:
    """Choose a command of a conversation's menu."""
    page.get_by_role("button", name=f"More: {title}").click()
    page.locator("#menu").get_by_role("button", name=command).click()


def saved(page: Page, title: str, command: str) -> Download:
    with page.expect_download() as download:
        choose(page, title, command)
    return download.value


def load(page: Page, *files: Path | str) -> None:
    page.locator("#import-files").set_input_files(files)


def test_a_question_is_answered_as_it_is_made(page: Page, server: Server):
    open_chat(page, server)
    page.get_by_role("button", name="What is 17 + 25?").click()
    expect(body(page)).to_have_text("42")
    expect(page.locator(".stats")).to_have_text(re.compile(r"[\d.]+ s to the first token.* · \d+ tokens"))
    expect(page.locator("#title")).to_have_text("What is 17 + 25?")
    ask(page, "Spell 'river' backwards.")
    expect(answers(page)).to_have_count(2)
    expect(body(page)).to_contain_text("revir")


def test_stop_go_on_and_retry(page: Page, server: Server):
    """A stopped answer goes on where it was cut; another one is a version beside it."""
    open_chat(page, server)
    ask(page, "Count from 1 to 150.")
    expect(body(page)).to_contain_text("5")
    expect(body(page).locator("p .cursor")).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".stats")).to_contain_text("stopped")
    cut = body(page).inner_text()
    assert "150" not in cut
    server.wait_for(lambda: server.num_used_pages() == 0, what="the engine goes on after Stop")
    goes_on(page, cut)
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".branches")).to_have_count(0)
    expect(body(page)).to_contain_text("3")
    page.keyboard.press("Escape")
    expect(page.locator(".branches")).to_have_text("2 / 2")
    page.get_by_role("button", name="Previous version").click()
    expect(body(page)).to_contain_text(str(last_number(cut) + 5))
    expect(answers(page)).to_have_count(1)


def test_conversations_stay_in_the_browser(page: Page, server: Server):
    open_chat(page, server)
    ask(page, "What is 2 + 2?")
    expect(page.locator(".stats")).to_be_visible()
    page.get_by_role("button", name="New conversation").click()
    ask(page, "What is 30 + 3?")
    expect(body(page)).to_have_text("33")
    page.reload()
    expect(body(page)).to_have_text("33")
    expect(listed(page)).to_have_text(["What is 30 + 3?", "What is 2 + 2?"])
    listed(page).nth(1).click()
    expect(body(page)).to_have_text("4")
    page.go_back()
    expect(body(page)).to_have_text("33")
    turns = [{"role": "user", "content": "Before"}, {"role": "assistant", "content": "An old answer", "stats": "1 s"}]
    older = json.dumps([{"id": "1", "title": "From version 0.2.0", "turns": turns}])
    page.evaluate("(older) => localStorage.setItem('rayline.talks', older)", older)
    page.reload()
    page.get_by_text("From version 0.2.0").click()
    expect(body(page)).to_have_text("An old answer")
    page.reload()
    expect(listed(page)).to_have_count(3)


def test_a_deleted_conversation_comes_back(page: Page, server: Server):
    open_chat(page, server)
    load(page, SAMPLE)
    choose(page, SAMPLE_TITLE, "Delete")
    expect(listed(page)).to_have_count(0)
    expect(page.locator("#empty")).to_be_visible()
    page.get_by_role("button", name="Undo").click()
    expect(answers(page)).to_have_count(2)
    page.reload()
    expect(answers(page)).to_have_count(2)
    choose(page, SAMPLE_TITLE, "Delete")
    expect(page.get_by_role("button", name="Undo")).to_be_visible()  # which says that it is gone from the store, too
    page.reload()
    expect(page.locator("#model")).to_have_text("demo")
    expect(listed(page)).to_have_count(0)


def test_two_tabs_keep_each_others_conversations(page: Page, server: Server):
    """Each has a conversation of its own, and both go on with a third one: nothing is lost."""
    open_chat(page, server)
    other = page.context.new_page()
    open_chat(other, server)
    ask(page, "What is 2 + 2?")
    ask(other, "What is 30 + 3?")
    for tab in (page, other):
        expect(tab.locator(".stats")).to_be_visible()
        expect(listed(tab)).to_have_count(2)
    other.get_by_text("What is 2 + 2?").click()
    expect(body(other)).to_have_text("4")
    ask(other, "What is 5 + 6?")
    expect(body(page)).to_have_text("11")  # the first tab follows
    ask(page, "What is 20 + 1?")
    expect(body(other)).to_have_text("21")
    for tab in (page, other):
        expect(tab.locator(".stats")).to_have_count(3)
        tab.reload()
        expect(answers(tab)).to_have_count(3)
        expect(listed(tab)).to_have_text(["What is 2 + 2?", "What is 30 + 3?"])


def test_a_reload_keeps_half_an_answer_and_goes_on(page: Page, server: Server):
    open_chat(page, server)
    ask(page, "Count from 1 to 150.")
    expect(body(page)).to_contain_text("20")
    page.reload()
    expect(page.locator(".fault")).to_contain_text("Cut short")
    cut = body(page).inner_text()
    assert cut.startswith("1 2 3")
    assert "150" not in cut
    goes_on(page, cut)
    expect(page.locator(".fault")).to_have_count(0)


def test_another_tab_says_that_it_writes_the_answer(page: Page, server: Server):
    """It is no cut answer there, and grows as it does in the first tab."""
    open_chat(page, server)
    ask(page, "Count from 1 to 150.")
    expect(body(page)).to_contain_text("5")
    other = page.context.new_page()
    other.goto(page.url)
    expect(other.locator(".cursor")).to_be_visible()
    expect(body(other)).to_contain_text(str(min(last_number(body(other).inner_text()) + 20, 149)))
    expect(other.locator(".fault")).to_have_count(0)


def test_an_answer_goes_on_while_another_conversation_is_shown(page: Page, server: Server):
    open_chat(page, server)
    ask(page, "Count from 1 to 150.")
    expect(body(page)).to_contain_text("5")
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#conversations .busy")).to_have_count(1)
    ask(page, "What is 30 + 3?")
    expect(body(page)).to_have_text("33")
    expect(page.locator("#conversations .busy")).to_have_count(0, timeout=30_000)
    page.get_by_text("Count from 1 to 150.").click()
    expect(body(page)).to_contain_text("149")
    expect(page.locator(".stats")).not_to_contain_text("stopped")


def test_a_message_is_edited_and_sent_again(page: Page, server: Server):
    """The old version stays beside the new one, with what was answered to it."""
    open_chat(page, server)
    ask(page, "What is 2 + 2?")
    expect(body(page)).to_have_text("4")
    ask(page, "What is 30 + 3?")
    expect(body(page)).to_have_text("33")
    first = page.get_by_role("article", name="You").first
    first.hover()
    first.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit your message").fill("What is 5 + 6?")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_count(1)
    expect(body(page)).to_have_text("11")
    expect(first.locator(".branches")).to_have_text("2 / 2")
    first.get_by_role("button", name="Previous version").click()
    expect(answers(page)).to_have_count(2)
    expect(body(page)).to_have_text("33")


def test_rename_and_search(page: Page, server: Server):
    open_chat(page, server)
    load(page, SAMPLE)
    page.get_by_role("button", name="New conversation").click()
    ask(page, "What is 2 + 2?")
    choose(page, "What is 2 + 2?", "Rename")
    page.get_by_label("New name").fill("An easy one")
    page.keyboard.press("Enter")
    expect(page.locator("#title")).to_have_text("An easy one")
    page.reload()
    expect(listed(page)).to_have_text(["An easy one", SAMPLE_TITLE])
    page.keyboard.press("Control+k")
    page.keyboard.type("STANDARD DEVIATION")
    expect(listed(page)).to_have_text([SAMPLE_TITLE])
    expect(page.locator(".piece")).to_contain_text("standard deviation")
    page.get_by_label("Search conversations").fill("easy")
    expect(listed(page)).to_have_text(["An easy one"])
    page.get_by_label("Search conversations").fill("nowhere")
    expect(page.locator("#none-found")).to_be_visible()


def test_conversations_are_saved_as_files_and_come_back(page: Page, server: Server, tmp_path: Path):
    """JSON holds everything, Markdown the text, the thoughts and who said what."""
    open_chat(page, server)
    load(page, SAMPLE)
    saved(page, SAMPLE_TITLE, "Save as JSON").save_as(tmp_path / "saved.json")
    saved(page, SAMPLE_TITLE, "Save as Markdown").save_as(tmp_path / "first.md")
    kept = ("role", "content", "reasoning", "calls", "callId", "name", "files", "finish", "stats")

    def told(path: Path) -> list[dict]:
        (conversation,) = json.loads(path.read_text())["conversations"]
        return [{key: message.get(key) for key in kept} for message in conversation["messages"]]

    assert told(tmp_path / "saved.json") == told(SAMPLE)
    load(page, tmp_path / "saved.json")
    expect(listed(page)).to_have_text([SAMPLE_TITLE] * 2)
    expect(answers(page)).to_have_count(2)

    def lines(name: str) -> list[str]:
        return [line for line in (tmp_path / name).read_text().splitlines() if line]

    assert lines("first.md")[0] == f"# {SAMPLE_TITLE}"
    assert "def deviation(values: list[float]) -> float:" in lines("first.md")
    (tmp_path / "renamed.md").write_text((tmp_path / "first.md").read_text().replace(SAMPLE_TITLE, "From Markdown", 1))
    load(page, tmp_path / "renamed.md")
    expect(listed(page)).to_have_count(3)
    expect(answers(page).last.locator("summary")).to_have_text("Reasoning")
    saved(page, "From Markdown", "Save as Markdown").save_as(tmp_path / "second.md")
    assert lines("second.md")[1:] == lines("first.md")[1:]


def test_other_files_are_read_or_named(page: Page, server: Server, tmp_path: Path):
    """Messages as the API takes them are a conversation, which may be gone on with."""
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "messages.json").write_text('{"messages": [{"role": "user", "content": "What is 2 + 2?"}]}')
    open_chat(page, server)
    load(page, tmp_path / "other.json")
    expect(page.locator("#notice")).to_have_text("other.json cannot be imported: This JSON holds no conversations")
    load(page, tmp_path / "messages.json")
    expect(listed(page)).to_have_text(["What is 2 + 2?"])
    page.get_by_role("button", name="Get an answer").click()
    expect(body(page)).to_have_text("4")


def test_settings_are_sent_and_errors_shown(page: Page, server: Server):
    open_chat(page, server)
    other = page.context.new_page()
    open_chat(other, server)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Most tokens").fill("3")
    page.get_by_label("System prompt").fill("Be short.")
    page.get_by_role("button", name="Save", exact=True).click()
    with page.expect_request("**/v1/chat/completions") as asked:
        ask(page, "Count from 1 to 40.")
    sent = asked.value.post_data_json
    assert sent["max_tokens"] == 3
    assert sent["messages"][0] == {"role": "system", "content": "Be short."}
    expect(page.locator(".stats")).to_contain_text("3 tokens · cut at the limit")
    other.get_by_role("button", name="Settings").click()
    expect(other.get_by_label("Most tokens")).to_have_value("3")  # so that saving here takes nothing back


def test_what_an_answer_may_hold_is_drawn_and_nothing_in_it_runs(page: Page, server: Server):
    """Markdown, addresses, formulas, code, HTML as it was written; thoughts and calls are folded away."""
    open_chat(page, server)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    load(page, SAMPLE)
    text = body(page)
    expect(text.locator("strong")).to_have_text("two lines")
    expect(text.locator("li input[type=checkbox]")).to_be_checked()
    expect(text.locator("td").nth(1)).to_have_css("text-align", "right")
    assert text.locator("a").evaluate_all("links => links.map((link) => link.href)") == [
        "https://example.org/notes", "https://example.org/manual", "https://example.org/picture.png"
    ]  # fmt: skip
    for link in text.locator("a").all():
        expect(link).to_have_attribute("rel", "noopener noreferrer")
    expect(text.locator(".katex")).to_have_count(3)
    expect(text.locator(".katex-display")).to_have_count(1)
    expect(text).to_contain_text("It costs $5 or $6 to compute")
    code = text.locator("pre code")
    expect(code.locator(".hljs-keyword").first).to_have_text("import")
    copy = text.get_by_role("button", name="Copy the code")
    expect(copy).to_be_visible()
    copy.click()
    assert page.evaluate("navigator.clipboard.readText()") == code.inner_text()
    expect(text.locator("img, script")).to_have_count(0)
    expect(text).to_contain_text("<script>document.title = 'broken in'</script>")
    expect(page).to_have_title(f"{SAMPLE_TITLE} · Rayline")
    thoughts = answers(page).last.locator(".reasoning")
    expect(thoughts.locator("strong")).not_to_be_visible()
    thoughts.get_by_text("Thought for 1.3 s").click()
    expect(thoughts.locator("strong")).to_have_text("code")
    call = answers(page).first.locator(".call")
    expect(call.locator("summary")).to_have_text("Called read_file")
    call.locator("summary").click()
    expect(call.locator("pre")).to_have_text('{\n  "path": "notes.txt"\n}')


def test_an_answer_looks_the_same_however_it_came(page: Page, server: Server):
    """Letter by letter, in pieces of any length, or at once; also where a link is defined behind its use."""
    open_chat(page, server)
    (sample,) = json.loads(SAMPLE.read_text())["conversations"]
    text = sample["messages"][-1]["content"] + "\n\n1. one\n\n   ```\n   code\n   ```\n2. two\n\nlast\n---\n"
    drawn = page.evaluate(
        """async (text) => {
            const { MarkdownView } = await import("/static/chat/markdown.js");
            const { loadHighlighter, loadTypesetter } = await import("/static/chat/libraries.js");
            await Promise.all([loadHighlighter(), loadTypesetter()]);
            const draw = async (text, step) => {
                const node = document.createElement("div");
                const view = new MarkdownView(node);
                for (let end = step; end < text.length + step; end += step) view.show(text.slice(0, end));
                await new Promise((resolve) => setTimeout(resolve));
                return node.innerHTML;
            };
            const results = [];
            for (const whole of [text, text + "\\n\\nsee [it][1]\\n\\n[1]: https://example.org/\\n"])
                for (const step of [5, 13, 40, whole.length]) results.push(await draw(whole, step));
            return results;
        }""",
        text,
    )
    assert len(set(drawn[:4])) == len(set(drawn[4:])) == 1
    assert 'href="https://example.org/"' in drawn[4]


def test_text_files_go_along(page: Page, server: Server, tmp_path: Path):
    (tmp_path / "sums.txt").write_text("What is 17 + 25?")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff")
    open_chat(page, server)
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Attach files of text").click()
    chooser.value.set_files([tmp_path / "sums.txt", tmp_path / "picture.png"])
    expect(page.locator("#notice")).to_have_text("picture.png cannot be attached: not a text")
    expect(page.locator("#attached li")).to_have_text(["sums.txt"])
    with page.expect_request("**/v1/chat/completions") as asked:
        ask(page, "Answer it.")
    assert asked.value.post_data_json["messages"] == [
        {"role": "user", "content": "sums.txt:\n```\nWhat is 17 + 25?\n```\n\nAnswer it."}
    ]
    expect(page.get_by_role("article", name="You").locator(".file summary")).to_have_text("sums.txt")
    expect(page.locator("#attached li")).to_have_count(0)


def serve_models(page: Page, *names: str) -> None:
    """Let the server name other models; it answers for none of them."""
    data = [{"id": name, "object": "model"} for name in names]
    page.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": data}))


def test_of_several_models_one_is_picked(page: Page, server: Server):
    serve_models(page, "demo", "other-coder")
    page.goto(server.url)
    expect(page.get_by_role("button", name="What is 17 + 25?")).to_be_visible()
    page.get_by_label("Model", exact=True).select_option("other-coder")
    expect(page.locator("#ideas")).to_contain_text("Python function")
    expect(page.locator("#ideas")).not_to_contain_text("17 + 25")
    page.reload()
    expect(page.get_by_label("Model", exact=True)).to_have_value("other-coder")
    page.get_by_label("Model", exact=True).select_option("demo")
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "What is 2 + 2?")
    assert request.value.post_data_json["model"] == "demo"


def test_the_reader_says_what_a_tool_returns(page: Page, server: Server):
    """The demo model calls nothing, so its place is taken by events as the API writes them."""
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    asked: list[dict] = []

    def answer(route: Route) -> None:
        asked.append(route.request.post_data_json)
        call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"at":'}}
        rest = {"index": 0, "function": {"arguments": ' "Oslo"}'}}
        deltas = [{"reasoning_content": "Let me look."}, {"tool_calls": [call]}, {"tool_calls": [rest]}]
        if len(asked) > 1:
            deltas = [{"content": "It rains."}]
        chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
        text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        route.fulfill(content_type="text/event-stream", body=text)

    page.route("**/v1/chat/completions", answer)
    open_chat(page, server)
    page.get_by_role("button", name="Settings").click()
    page.get_by_text("Tools", exact=True).click()
    page.get_by_label("Functions that the model may call").fill(json.dumps([tool]))
    page.get_by_role("button", name="Save", exact=True).click()
    ask(page, "How is the weather in Oslo?")
    expect(answers(page).locator(".call summary")).to_have_text("Called weather")
    page.get_by_label("What weather returns").fill("rain")
    page.get_by_role("button", name="Send the result").click()
    expect(body(page)).to_have_text("It rains.")
    assert asked[0]["tools"] == [tool]
    call, result = asked[1]["messages"][1:]
    assert call["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"at": "Oslo"}'}
    assert result == {"role": "tool", "content": "rain", "tool_call_id": "call_1"}


def small_targets(page: Page) -> list[str]:
    """What can be pressed and is smaller than it should be; links within a text are as large as their words."""
    return page.evaluate(
        """(least) => [...document.querySelectorAll("button, select, summary, input, textarea, a")]
            .filter((node) => node.checkVisibility() && !node.closest(".message .body"))
            .map((node) => [node, node.getBoundingClientRect()])
            .filter(([node, { width, height }]) => width < least || height < least)
            .map(([node, { width, height }]) => `${width} x ${height}: ${node.outerHTML.slice(0, 100)}`)""",
        MIN_TARGET_PX,
    )


def check_layout(page: Page, width: int, height: int) -> None:
    """The parts of the page lie beside or below each other, within the window, and nothing is wider than it."""
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    log, field, bar = (page.locator(name).bounding_box() for name in ("#log", "#ask", "#bar"))
    assert bar["y"] == 0
    assert bar["y"] + bar["height"] <= log["y"] + 1
    assert log["y"] + log["height"] <= field["y"] + 1
    assert field["y"] + field["height"] <= height + 1
    assert log["height"] > height / 2
    side = page.locator("#side").bounding_box()
    if page.locator("#side").is_visible():
        assert side["x"] + side["width"] <= log["x"] + 1
        assert side["height"] == height
    else:
        assert log["width"] == width
    for part in page.locator(".message > *, .message .code, .message .table").all():
        box = part.bounding_box()
        if box is not None:
            assert log["x"] <= box["x"]
            assert box["x"] + box["width"] <= log["x"] + log["width"], part.evaluate("node => node.outerHTML")


@pytest.mark.parametrize(("width", "height"), [(1200, 800), (768, 1024), (380, 720)])
def test_layout_at_three_widths_and_accessibility(page: Page, server: Server, width: int, height: int):
    """In light and dark, with everything that an answer may hold; axe-core reads the widest and the narrowest."""
    is_narrow = width < 740
    is_read = width != 768
    page.set_viewport_size({"width": width, "height": height})
    page.goto(server.url)
    expect(page.locator("#ideas button")).to_have_count(3)
    page.screenshot(path=SHOTS / f"chat-empty-{width}.png")
    load(page, SAMPLE)
    expect(page.locator(".katex")).to_have_count(3)
    page.get_by_role("button", name="Dismiss").click()
    for theme in ("light", "dark"):
        if page.evaluate("document.documentElement.dataset.theme") != theme:
            if is_narrow:
                page.get_by_role("button", name="Conversations", exact=True).click()
            page.get_by_role("button", name="Dark or light").click()
            page.keyboard.press("Escape")
        expect(page.locator("#side")).to_be_visible(visible=not is_narrow)
        check_layout(page, width, height)
        assert small_targets(page) == []
        assert not is_read or serious_faults(page) == []
        page.screenshot(path=SHOTS / f"chat-{width}-{theme}.png")
    page.get_by_role("button", name="Settings").click()
    assert not is_read or serious_faults(page) == []
    assert small_targets(page) == []
    page.screenshot(path=SHOTS / f"chat-settings-{width}.png")
