"""The server's page, in a real browser."""

import os
import re

import pytest
from fastapi.testclient import TestClient

from pplug_jax.serve.app import make_app
from tests.support.server import Running

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

INPUT = "Generate a title for the following abstract of a paper: Rivers are measured."
NAME = "O'Hara <b>?#ü"
pytestmark = pytest.mark.slow


def test_somebody_is_made_asked_for_and_erased(server: Running, browser: playwright.Page) -> None:
    expect = playwright.expect
    browser.goto(server.url)
    browser.get_by_label("API key").fill(server.keys[0])
    assert browser.title() == server.service.name

    browser.get_by_label("Person", exact=True).fill(NAME)
    browser.get_by_role("button", name="Open").click()
    expect(browser.get_by_role("heading", name=f"With {NAME}")).to_be_visible()
    expect(browser.locator("#trouble")).to_be_hidden()
    expect(browser.locator("#count")).to_have_text("nothing yet")
    items = [{"title": f"Title <i>{i}</i>", "abstract": f"River {i} is long."} for i in range(3)]
    for count, item in enumerate(items, 1):
        for field, text in item.items():
            browser.get_by_label(field).fill(text)
        browser.get_by_role("button", name="Add").click()
        expect(browser.locator("#items li")).to_have_count(count)
    expect(browser.locator("#items li").first).to_contain_text("Title <i>2</i>")

    browser.get_by_label("input").fill(INPUT)
    browser.get_by_role("button", name="Answer").click()
    expect(browser.locator("#with-note")).to_have_text("3 items were read")
    expect(browser.get_by_role("button", name="Answer")).to_be_enabled()
    personalizer = server.service.people.personalizer
    assert browser.locator("#with").text_content() == personalizer.generate(INPUT, items)
    assert browser.locator("#without").text_content() == personalizer.generate(INPUT)
    weights = [float(text[:-1]) for text in browser.locator(".weight").all_text_contents()]
    assert weights == sorted(weights, reverse=True)
    assert sum(weights) == pytest.approx(100, abs=2)
    if folder := os.environ.get("PPLUG_TEST_SCREENSHOTS"):
        browser.screenshot(path=f"{folder}/wide.png", full_page=True)
        browser.emulate_media(color_scheme="dark")
        browser.set_viewport_size({"width": 420, "height": 860})
        browser.screenshot(path=f"{folder}/narrow.png", full_page=True)

    browser.get_by_role("button", name="Erase this item").first.click()
    expect(browser.locator("#items li")).to_have_count(2)
    browser.get_by_role("button", name="Erase this person").click()
    expect(browser.locator("#person")).to_be_hidden()
    assert server.ask("GET", "/v1/personas").json()["personas"] == []


def test_what_goes_wrong_is_told(server: Running, browser: playwright.Page) -> None:
    expect = playwright.expect
    browser.goto(server.url)
    expect(browser.get_by_role("alert")).to_have_text("no API key of this server's is given")
    browser.get_by_label("API key").fill("nonsense")
    browser.get_by_label("input").fill(INPUT)
    browser.get_by_role("button", name="Answer").click()
    expect(browser.get_by_role("button", name="Answer")).to_be_enabled()
    expect(browser.get_by_role("alert")).to_have_text("no API key of this server's is given")


def test_the_page_asks_nobody_else_and_can_be_left_out(server: Running) -> None:
    response = server.http.get("/")
    assert response.status_code == 200
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert re.findall(r"(?:https?:)?//[\w.-]+\.\w+", response.text) == []
    assert "/" not in server.http.get("/openapi.json").json()["paths"]
    without = TestClient(make_app(server.service, ui=False))
    assert without.get("/").status_code == 404
