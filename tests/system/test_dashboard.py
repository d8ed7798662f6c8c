"""The dashboard in a real browser: progress moves without a reload, and a cell's number can be read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from service.client import Client
from tests.system.conftest import Running
from tests.system.test_kill import submit

pytestmark = [pytest.mark.ray, pytest.mark.browser]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM, "the browser tests need Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page on which no script may fail and nothing may be fetched from elsewhere."""
    context = browser.new_context(viewport={"width": 1240, "height": 1000})
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on(
        "request",
        lambda r: None if "127.0.0.1" in r.url or r.url[:5] in ("data:", "blob:") else problems.append(r.url),
    )
    yield page
    context.close()
    assert problems == []


def test_a_sweep_seen_from_start_to_end(service: Running, page: Page, tmp_path: Path) -> None:
    with Client(service.url) as client:
        sweep_id = submit(client, name="seen")
        page.goto(f"{service.url}/")
        page.evaluate("window.neverReloaded = true")
        row = page.locator("tr", has_text=sweep_id)
        expect(row.locator(".state")).to_have_text("running", timeout=30_000)
        row.get_by_role("link").click()

        page.evaluate("window.neverReloaded = true")
        done = page.locator("#steps-done")
        expect(page.locator(".facts .state")).to_have_text("running", timeout=30_000)
        first = int(done.get_attribute("data-done") or 0)
        page.wait_for_function(
            "before => Number(document.querySelector('#steps-done').dataset.done) > before",
            arg=first,
            timeout=30_000,
        )
        shots = Path(os.environ.get("DDPSWEEP_SCREENSHOTS", tmp_path))
        page.screenshot(path=shots / "dashboard-running.png")
        expect(page.locator(".facts .state")).to_have_text("completed", timeout=60_000)
        expect(page.locator("#runs-done")).to_have_text("120 of 120 runs")

        panel = client.heatmap_json(sweep_id, metric="train_loss")
        cell = panel["cells"][0]
        for metric, name in (("train_loss", "training loss"), ("accuracy", "test accuracy")):
            expect(page.locator(f'table[data-metric="{metric}"] caption')).to_contain_text(name)
            plot = page.locator(f'.plot[data-metric="{metric}"]')
            expect(plot.locator(".heatmaplayer image")).to_have_count(1)
        shown = page.locator(
            'table[data-metric="train_loss"] td[data-learning-rate="0.4"][data-vxx-reg="5e-05"]'
        )
        number = f"{cell['improvement']:+.2f}"
        expect(shown).to_contain_text(number)
        # The same number stands in the plot's cell.
        drawn = page.locator('.plot[data-metric="train_loss"] .heatmap-label').first
        expect(drawn).to_contain_text(number)
        assert page.evaluate("window.neverReloaded") is True
        page.screenshot(path=shots / "dashboard.png", full_page=True)


def test_a_page_of_a_sweep_that_is_over_stops_asking(service: Running, page: Page) -> None:
    with Client(service.url) as client:
        sweep_id = submit(client, name="short", seeds=1, training={"steps": 20, "batch_size": 16})
        list(client.watch(sweep_id))
    page.goto(f"{service.url}/sweeps/{sweep_id}")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(2500)
    assert [url for url in asked if "/live" in url and "static" not in url] == []
    assert json.loads(page.locator("table[data-figure]").first.get_attribute("data-figure") or "")["data"]
