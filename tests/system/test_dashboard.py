"""The dashboard in a real browser: progress moves without a reload, a cell's number can be read, buttons act.

What needs a pack to be trained is seen on the whole service; all else on the API alone, over a database that
is filled as a cluster would.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from playwright.sync_api import Browser, Dialog, Page, expect, sync_playwright
from sqlalchemy import Engine, update

from service.app import create_app
from service.client import Client
from service.config import Settings
from service.db.engine import write
from service.db.tables import sweeps
from tests.service import stage
from tests.system.conftest import Running, wait_for
from tests.system.test_kill import submit

pytestmark = pytest.mark.browser

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
def url(sqlite_engine: Engine) -> Iterator[str]:
    """The API alone, over the test's database."""
    app = create_app(Settings(database_url=sqlite_engine.url.render_as_string()))
    bound = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    wait_for(lambda: server.started, 30)
    yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    server.should_exit = True
    thread.join(30)


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    """Where pictures of the pages go."""
    return Path(os.environ.get("DDPSWEEP_SCREENSHOTS", tmp_path))


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


@pytest.mark.ray
def test_a_sweep_seen_from_start_to_end(service: Running, page: Page, shots: Path) -> None:
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


@pytest.mark.ray
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


def open_sweep(page: Page, url: str, sweep_id: str) -> None:
    page.goto(f"{url}/sweeps/{sweep_id}")
    page.evaluate("window.neverReloaded = true")


def expect_state(page: Page, state: str) -> None:
    """Wait until the page says so, and see that it was never loaded again."""
    expect(page.locator(".facts .state")).to_have_text(state)
    assert page.evaluate("window.neverReloaded") is True


def button_names(page: Page) -> list[str]:
    return page.get_by_role("group", name="Actions").get_by_role("button").all_inner_texts()


def test_pause_and_resume_without_a_reload(url: str, page: Page, sqlite_engine: Engine, shots: Path) -> None:
    sweep_id = stage.submit(sqlite_engine, "long", "sgd", "adam")
    (lease,) = stage.running(sqlite_engine, 1)
    open_sweep(page, url, sweep_id)
    assert button_names(page) == ["Pause", "Cancel"]
    page.get_by_role("button", name="Pause").click()
    expect_state(page, "pausing")
    stage.stop(sqlite_engine, lease)
    expect_state(page, "paused")
    assert button_names(page) == ["Resume", "Cancel"]
    expect(page.get_by_role("status")).to_have_text("This sweep is paused.")
    page.screenshot(path=shots / "dashboard-paused.png")
    page.get_by_role("button", name="Resume").click()
    expect_state(page, "running")
    assert button_names(page) == ["Pause", "Cancel"]


def test_the_keyboard_alone_is_enough(url: str, page: Page, sqlite_engine: Engine) -> None:
    """Buttons are reached by Tab, and a refresh takes the focus away from nothing."""
    sweep_id = stage.submit(sqlite_engine, "long", "sgd")
    open_sweep(page, url, sweep_id)
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "act-pause":
            break
    page.wait_for_timeout(1500)  # more than one refresh
    assert page.evaluate("document.activeElement.id") == "act-pause"
    page.keyboard.press("Enter")
    expect_state(page, "paused")
    # The button is gone: its neighbours are the next to be reached.
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "act-resume"
    page.keyboard.press("Space")
    expect_state(page, "queued")


def test_cancel_is_done_only_once_it_is_confirmed(url: str, page: Page, sqlite_engine: Engine) -> None:
    sweep_id = stage.submit(sqlite_engine, "wrong", "sgd")
    open_sweep(page, url, sweep_id)
    asked: list[str] = []

    def answer(dialog: Dialog) -> None:
        asked.append(dialog.message)
        if len(asked) == 1:
            dialog.dismiss()
        else:
            dialog.accept()

    page.on("dialog", answer)
    cancel = page.get_by_role("button", name="Cancel")
    cancel.click()
    page.wait_for_timeout(500)
    expect_state(page, "queued")
    cancel.click()
    expect_state(page, "cancelled")
    assert len(asked) == 2
    assert asked[0].startswith("Cancel wrong?")
    assert button_names(page) == ["Retry"]


def test_a_failed_pack_tells_why_and_can_be_retried(
    url: str, page: Page, sqlite_engine: Engine, shots: Path
) -> None:
    sweep_id = stage.failed_sweep(sqlite_engine)
    open_sweep(page, url, sweep_id)
    expect_state(page, "failed")
    failed = page.locator("#failed-1")
    expect(failed).to_contain_text(stage.CAUSE)
    expect(failed.locator(".excerpt")).to_contain_text("line 29\nout of memory <b>")
    page.locator("#packs summary").click()
    page.screenshot(path=shots / "dashboard-failed.png", full_page=True)

    page.get_by_role("button", name="Retry the failed packs").click()
    # The sweep was over; now the page follows it again, with what was opened still open.
    expect_state(page, "running")
    expect(page.locator(".failures")).to_have_count(0)
    (lease,) = stage.running(sqlite_engine, 1)
    expect(page.locator("#packs .attempt", has_text="2 running on 10.0.0.2")).to_be_visible()
    stage.finish(sqlite_engine, lease, 0.5)
    expect_state(page, "completed")
    assert page.get_by_role("group", name="Actions").count() == 0

    page.get_by_role("link", name="Log of pack 1, attempt 1").click()
    expect(page.locator("pre.log").first).to_contain_text("out of memory <b>")


def test_a_refusal_is_shown(url: str, browser: Browser, sqlite_engine: Engine) -> None:
    """Not with the strict page: the browser reports a refused request as an error of its own."""
    sweep_id = stage.submit(sqlite_engine, "quick", "sgd")
    (lease,) = stage.running(sqlite_engine, 1)
    with browser.new_context() as context:
        page = context.new_page()
        open_sweep(page, url, sweep_id)
        # The sweep ends between the page's last look and the click.
        page.route("**/live", lambda route: route.abort())
        stage.finish(sqlite_engine, lease)
        page.get_by_role("button", name="Pause").click()
        alert = page.get_by_role("alert")
        expect(alert).to_have_text(f"sweep {sweep_id} is completed: it cannot pause")
        page.route("**/pause", lambda route: route.abort())
        page.get_by_role("button", name="Pause").click()
        expect(alert).to_have_text("The server does not answer. Try again later.")
        assert page.evaluate("window.neverReloaded") is True


def test_a_paused_sweep_is_asked_about_less_often(url: str, page: Page, sqlite_engine: Engine) -> None:
    sweep_id = stage.submit(sqlite_engine, "long", "sgd")
    open_sweep(page, url, sweep_id)
    page.get_by_role("button", name="Pause").click()
    expect_state(page, "paused")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(3000)
    assert asked == []
    with write(sqlite_engine) as connection:
        connection.execute(update(sweeps).values(runs_reused=5))
    expect(page.locator("#runs-reused")).to_have_text("5 reused", timeout=15_000)


def test_the_cluster(url: str, page: Page, sqlite_engine: Engine, shots: Path) -> None:
    page.goto(url)
    page.get_by_role("link", name="Cluster").click()
    page.evaluate("window.neverReloaded = true")
    warning = page.get_by_text("Nothing trains: no dispatcher is running.")
    expect(warning).to_be_visible()
    sweep_id = stage.busy_cluster(sqlite_engine)
    expect(warning).to_have_count(0)
    expect(page.locator("#nodes tbody tr")).to_have_count(3)
    row = page.locator("#running tbody tr")
    expect(row).to_contain_text(sweep_id)
    for words in ("busy", "vision", "10.0.0.2", "Xeon 8481C", "2 / 4"):
        expect(row).to_contain_text(words)
    expect(page.locator("#teams tbody tr")).to_have_count(2)
    assert page.evaluate("window.neverReloaded") is True
    page.screenshot(path=shots / "dashboard-cluster.png", full_page=True)
    row.get_by_role("link", name="busy").click()
    expect(page.locator(".facts .state")).to_have_text("running")
