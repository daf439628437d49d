"""Every widget in every state: nothing for axe-core to find, no error, nothing from elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from .books import violations
from .gallery import Picture, console_message, console_state, hotplug_state, pictures, show

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.browser, pytest.mark.timeout(120)]

PICTURES = {picture.name: picture for picture in pictures()}


@pytest.fixture(scope="module")
def page(browser: Browser) -> Iterator[Page]:
    page = browser.new_page()
    yield page
    page.close()


@pytest.fixture(autouse=True)
def _quiet(page: Page) -> Iterator[None]:
    errors: list[str] = []
    note = lambda error: errors.append(str(error))  # noqa: E731
    page.on("pageerror", note)
    asked: list[str] = []
    page.on("request", lambda sent: asked.append(sent.url))
    yield
    page.remove_listener("pageerror", note)
    assert errors == []
    assert [url for url in asked if not url.startswith(("blob:", "data:", "about:"))] == []


@pytest.mark.parametrize("name", PICTURES)
def test_axe_finds_nothing(page: Page, name: str) -> None:
    show(page, PICTURES[name])
    assert violations(page, "#here") == []


def test_what_a_guest_wrote_is_text(page: Page) -> None:
    show(page, PICTURES["console-running"])
    lines = page.get_by_test_id("lines")
    assert "<script>alert(1)</script>" in lines.text_content()
    assert lines.locator("script").count() == 0


def test_live_updates_patch_rows_and_keep_the_selection_and_the_input(page: Page) -> None:
    show(page, PICTURES["hotplug-waiting"])
    page.evaluate("window.row = document.querySelector('[data-stage=guest]')")
    for waited in (3.0, 4.0):
        state = hotplug_state()
        operations = dict(PICTURES["hotplug-waiting"].state["operations"])
        stages = [
            {**each, "time": f"{waited} of 10 s"} if each["key"] == "guest" else each
            for each in operations["bob"]["stages"]
        ]
        state["operations"] = {"bob": {**operations["bob"], "stages": stages}}
        page.evaluate("(value) => window.model.set('operations', value)", state["operations"])
    assert page.evaluate("window.row.isConnected && window.row.innerText.includes('4.0 of 10 s')")


def test_force_asks_what_may_be_lost_and_escape_goes_back(page: Page) -> None:
    show(page, PICTURES["hotplug-waiting"])
    page.get_by_test_id("force").click()
    assert "is lost" in page.get_by_test_id("question").inner_text()
    page.keyboard.press("Escape")
    assert page.get_by_test_id("question").is_hidden()
    assert page.evaluate("document.activeElement.dataset.testid") == "force"
    assert page.evaluate("(window.sent ?? []).length") == 0
    page.get_by_test_id("force").click()
    page.get_by_test_id("yes").click()
    assert page.evaluate("window.sent.at(-1).op") == "force"


def test_tabs_search_and_input_by_keyboard(page: Page) -> None:
    tabs = (("alice", "running"), ("bob", "running"))
    said = (console_message("alice"), console_message("bob", "needle one\nnothing\nNeedle two\n"))
    show(page, Picture("keys", PICTURES["console-running"].widget, console_state(*tabs), said))
    page.get_by_role("tab", name="alice").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.key") == "bob"
    page.get_by_label("Search this console").fill("needle")
    assert page.get_by_test_id("lines").locator("mark").count() == 2
    assert page.get_by_test_id("found").inner_text() == "2 found"
    page.get_by_test_id("input").fill("c")
    page.keyboard.press("Enter")
    sent = page.evaluate("window.sent.at(-1)")
    assert (sent["op"], sent["vm"], sent["text"]) == ("write", "bob", "c")


def test_pause_holds_lines_back_and_says_how_many(page: Page) -> None:
    show(page, PICTURES["console-running"])
    page.get_by_test_id("pause").click()
    message = {**console_message("alice", "one more\n"), "first": 0}
    message["lines"][0][0] = 99
    page.evaluate("(message) => window.tell(message)", message)
    assert "one more" not in page.get_by_test_id("lines").text_content()
    page.get_by_role("button", name="1 new lines").click()
    assert "one more" in page.get_by_test_id("lines").text_content()


def test_older_lines_that_come_late_stand_before_the_newer_ones(page: Page) -> None:
    """News are sent to every window, also to one that was just opened and has asked for what was before."""
    whole = console_message("alice", "one\ntwo\nthree\n$ ")
    news = {**whole, "lines": whole["lines"][-2:]}
    show(page, Picture("late", PICTURES["console-running"].widget, console_state(("alice", "running")), (news, whole)))
    assert page.get_by_test_id("lines").locator(".ivl-line > span").all_inner_texts() == ["one", "two", "three", "$ "]


OVERLAPS = """() => {
    const boxes = [...document.querySelectorAll(".ivl-badge")].map((each) => [each.textContent, each.getBoundingClientRect()]);
    return boxes.flatMap(([one, a], at) => boxes.slice(at + 1)
        .filter(([, b]) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)
        .map(([other]) => `${one} on ${other}`));
}"""


@pytest.mark.parametrize("name", ["bench-running", "bench-failed", "bench-16-vms"])
def test_no_badge_lies_on_another(page: Page, name: str) -> None:
    show(page, PICTURES[name])
    assert page.locator(".ivl-badge").count() > 3
    assert page.evaluate(OVERLAPS) == []


def test_axe_finds_what_is_wrong(page: Page) -> None:
    page.set_content('<html lang="en"><title>x</title><main id="here"><button></button></main>')
    assert "button-name" in violations(page, "#here")[0]
