"""The page in a real browser: talking, turning the dial, seeing the experts that ran."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from alloc_moe.runtime.text.model import TextModel, load

sync_api = pytest.importorskip("playwright.sync_api")
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium in the path")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page whose errors fail the test; the browser tells of what its policy has blocked."""
    page = browser.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: said.type == "error" and errors.append(said.text))
    yield page
    page.close()
    assert [text for text in errors if "status of 4" not in text] == []


def say(page: Any, text: str) -> str:
    """Say something, and return the answer when it is there."""
    before = page.locator(".assistant").count()
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()
    sync_api.expect(page.locator(".assistant")).to_have_count(before + 1)
    sync_api.expect(page.locator("#state")).to_have_text("ready")
    return str(page.locator(".assistant").last.text_content())


def open_page(page: Any, url: str) -> None:
    page.goto(url)
    sync_api.expect(page.locator("#state")).to_have_text("ready")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Tokens").fill("8")


def test_a_talk_with_the_dial_turned_in_between(page: Any, served: Any, model: TextModel) -> None:
    open_page(page, served.url)
    assert page.get_by_role("heading", name="toy").is_visible()
    [first] = model.generate(messages=[{"role": "user", "content": "<b>é"}], max_new_tokens=8)
    assert say(page, "<b>é") == first.text
    assert page.locator(".user").text_content() == "<b>é"
    plan = model.session.plan
    assert page.locator(".layer").count() == len(plan.layers)
    total = page.locator("#total")
    assert re.fullmatch(r"[\d.]+ of 8 per token", total.text_content())
    compiled = float(total.text_content().split()[0])

    page.get_by_label("Budget").fill("0.38")
    assert page.locator("#budget").text_content() == "0.38"
    talk = [
        {"role": "user", "content": "<b>é"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "Two"},
    ]
    [second] = model.generate(messages=talk, max_new_tokens=8, budget=0.38)
    assert say(page, "Two") == second.text
    dialled = float(total.text_content().split()[0])
    assert dialled < compiled
    bars = [float(cell.get_attribute("value") or 0) for cell in page.locator("meter").all()]
    assert sum(bars) == pytest.approx(dialled, abs=0.02)


def test_a_refusal_is_shown(page: Any, served: Any) -> None:
    open_page(page, served.url)
    page.get_by_label("Tokens").fill("5000")
    page.get_by_label("Message").fill("One")
    page.get_by_role("button", name="Send").click()
    sync_api.expect(page.locator(".error")).to_contain_text("5000 new tokens were asked for")


def test_an_answer_can_be_stopped(page: Any, slow: TextModel, serve: Callable[..., Any]) -> None:
    server = serve(slow)
    open_page(page, server.url)
    page.get_by_label("Tokens").fill("50")
    page.get_by_label("Message").fill("One")
    page.get_by_label("Message").press("Enter")
    server.wait_for("running", 1)
    page.get_by_role("button", name="Stop").click()
    sync_api.expect(page.locator("#state")).to_have_text("ready")
    server.wait_for("running", 0)
    assert server.metric("cancelled_total") == 1


def test_a_key_is_sent(page: Any, model: TextModel, serve: Callable[..., Any]) -> None:
    server = serve(model, key="secret")
    page.goto(server.url)
    sync_api.expect(page.locator("#state")).to_contain_text("The key is missing or wrong")
    page.get_by_label("Key").fill("secret")
    page.get_by_label("Key").press("Tab")
    sync_api.expect(page.locator("#state")).to_have_text("ready")
    assert say(page, "One")


def test_a_model_that_only_continues_texts(
    page: Any, bundle: Path, serve: Callable[..., Any]
) -> None:
    model = load(bundle, ep="cpu")
    server = serve(model)
    page.goto(server.url)
    sync_api.expect(page.locator("#state")).to_contain_text("it wasn't trained to chat")
    assert page.get_by_label("Budget").is_disabled()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Tokens").fill("8")
    assert say(page, "One") == model.generate(["One"], max_new_tokens=8)[0].text
