"""The dashboard in a real browser: progress moves without a reload, a cell's number can be read, buttons act.

What needs a pack to be trained is seen on the whole service; all else on the API alone, over a database that
is filled as a cluster would.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from playwright.sync_api import Browser, Dialog, Page, Request, Route, expect, sync_playwright
from sqlalchemy import Engine, update

from service.app import create_app
from service.client import Client
from service.config import Settings
from service.db.engine import write
from service.db.tables import sweeps
from service.paper.presets import PRESETS, idempotency_key
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


OWN = """
name: my own
dataset: wine
model: {kind: fcn, hidden: [4], activation: tanh}
training: {steps: 20, batch_size: 16}
seeds: 1
grids:
  - {baseline: sgd, learning_rate: [0.1], vxx_reg: [1.0e-4]}
"""


def test_a_spec_of_ones_own_is_checked_and_submitted(url: str, page: Page, shots: Path) -> None:
    page.goto(url)
    page.get_by_role("main").get_by_role("link", name="New sweep").click()
    expect(page.get_by_role("heading", name="From the paper")).to_be_visible()
    page.screenshot(path=shots / "dashboard-new.png", full_page=True)
    page.get_by_role("link", name="fig9", exact=True).click()
    spec = page.get_by_label("Spec, in YAML")
    expect(spec).to_have_value(re.compile("name: fig9"))
    spec.fill(OWN)
    page.evaluate("window.neverReloaded = true")
    # By the keyboard alone.
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    said = page.locator("#own-said")
    expect(said).to_have_text(
        re.compile(r"^The spec is good: 2 runs in 1 pack, 40 updates, about \d+ s of one core")
    )
    spec.press("End")
    spec.press("Space")
    expect(said).to_be_empty()
    page.get_by_role("button", name="Submit", exact=True).click()
    page.wait_for_url(re.compile("/sweeps/"))
    expect(page.get_by_role("heading", level=1)).to_contain_text("my own")
    expect(page.locator(".facts .state")).to_have_text("queued")


def test_what_is_wrong_in_a_spec_is_told_field_by_field(url: str, browser: Browser, shots: Path) -> None:
    """Not with the strict page: the browser reports a refused request as an error of its own."""
    with browser.new_context(viewport={"width": 400, "height": 800}) as context:
        page = context.new_page()
        page.goto(f"{url}/new")
        spec, alert = page.get_by_label("Spec, in YAML"), page.locator("#own-alert")
        spec.fill(OWN.replace("wine", "<b>wine").replace("[0.1]", "[0.1, -1]"))
        for button in ("Validate", "Submit"):
            page.get_by_role("button", name=button, exact=True).click()
            expect(alert).to_contain_text("The spec has 2 errors:")
            expect(alert.get_by_role("listitem").first).to_contain_text(
                'dataset: got "<b>wine"; allowed: one of'
            )
            expect(alert.get_by_role("listitem").last).to_contain_text("grids[0].learning_rate[1]: got -1")
            expect(alert).to_be_in_viewport()
            expect(spec).to_have_attribute("aria-invalid", "true")
        page.screenshot(path=shots / "dashboard-new-errors.png")
        assert page.evaluate("document.documentElement.scrollWidth") == 400
        page.route("**/api/v1/sweeps", lambda route: route.abort())
        spec.fill(OWN)
        page.get_by_role("button", name="Submit", exact=True).click()
        expect(alert).to_have_text("The server does not answer. Try again later.")
        expect(spec).to_have_attribute("aria-invalid", "false")


def test_an_answer_that_got_lost_makes_no_second_sweep(url: str, browser: Browser) -> None:
    """The sweep is stored, but the page does not hear of it; a changed spec is another one."""
    with browser.new_context() as context, Client(url) as client:
        page = context.new_page()
        page.goto(f"{url}/new")

        def lose(route: Route) -> None:
            route.fetch()
            route.abort()

        page.route("**/api/v1/sweeps", lose)
        for text, names in ((OWN, ["my own"]), (OWN.replace("my own", "mine"), ["mine", "my own"])):
            page.get_by_label("Spec, in YAML").fill(text)
            for _ in range(2):
                page.get_by_role("button", name="Submit", exact=True).click()
                expect(page.locator("#own-alert")).to_contain_text("does not answer")
            assert [sweep["name"] for sweep in client.sweeps()] == names


def test_the_papers_sweeps_are_submitted_once(url: str, page: Page) -> None:
    sent: list[tuple[str, str]] = []

    def note(request: Request) -> None:
        if request.method == "POST" and request.url.endswith("/sweeps"):
            sent.append((request.headers["idempotency-key"], request.post_data_json["name"]))

    page.on("request", note)
    with Client(url) as client:
        page.goto(f"{url}/new")
        page.get_by_role("button", name="Submit quick: fig9").click()
        page.wait_for_url(re.compile("/sweeps/"))
        (first,) = client.sweeps()
        assert page.url.endswith(first["id"])
        assert (first["name"], first["spec"]["seeds"]) == ("fig9", 3)

        # One that was cancelled goes on.
        client.cancel(first["id"])
        page.goto(f"{url}/new")
        page.get_by_role("button", name="Submit quick: fig9").click()
        page.wait_for_url(re.compile("/sweeps/"))
        (again,) = client.sweeps()
        assert (again["id"], again["state"]) == (first["id"], "queued")
        sent.clear()

        # Several sweeps are linked to; those that are there are taken.
        documents = PRESETS["fig4a"].documents()
        for _ in range(2):
            page.goto(f"{url}/new")
            page.get_by_role("button", name="Submit full: fig4a").click()
            links = page.locator("#said-fig4a a")
            expect(links).to_have_text(["fig4a-sgd", "fig4a-rmsprop", "fig4a-ekfac"])
            assert len(client.sweeps()) == 4
        links.first.click()
        expect(page.locator("h1")).to_contain_text("fig4a-sgd")
        expected = [(idempotency_key(document), document["name"]) for document in documents.values()]
        assert sent == expected * 2


def test_a_preset_that_is_refused_says_why(url: str, browser: Browser) -> None:
    with browser.new_context() as context, Client(url) as client:
        client.put_team("default", max_queued_runs=10)
        page = context.new_page()
        page.goto(f"{url}/new")
        page.get_by_role("button", name="Submit quick: fig9").click()
        alert = page.locator("#alert-fig9")
        expect(alert).to_contain_text("fig9: ")
        expect(alert).to_contain_text("10")
        assert client.sweeps() == []
        assert page.url == f"{url}/new"


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
