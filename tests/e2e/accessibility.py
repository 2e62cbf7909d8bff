"""What axe-core finds wrong with a page; its published file lies beside this one (MPL-2.0), for the tests alone."""

from pathlib import Path

from playwright.sync_api import Page

_AXE = Path(__file__).parent / "axe-core-4.14.1" / "axe.min.js"
# Colours on their way to others are read when they have arrived.
_FIND = """async () => {
    const passing = document.getAnimations().filter((one) => one.effect.getComputedTiming().iterations !== Infinity);
    await Promise.allSettled(passing.map(({ finished }) => finished));
    return (await axe.run()).violations
        .filter(({ impact }) => impact === "serious" || impact === "critical")
        .map(({ id, help, nodes }) => `${id}: ${help}: ${nodes.map(({ html }) => html.slice(0, 200)).join(" | ")}`);
}"""


def serious_faults(page: Page) -> list[str]:
    """Faults of the page as it is shown now that keep people from using it, each in a line."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(_AXE.read_text() + ";0")  # the page's policy would refuse a script element
    faults: list[str] = page.evaluate(_FIND)
    return faults
