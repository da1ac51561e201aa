"""Tests of the page in a browser.

The page is silent and sortable, and it is readable in the dark and on a phone.
"""

import shutil

import pytest

from tests.support.run_folders import add_rewards, write_run, write_study
from zofo.report import write_report

sync_api = pytest.importorskip("playwright.sync_api")


def until(page, expression, arg=None):
    """Poll the page from Python until the expression is true.

    The page forbids eval, so Playwright cannot poll inside it.
    """
    for _ in range(300):
        if page.evaluate(expression, arg):
            return
        page.wait_for_timeout(100)
    pytest.fail(f"never true: {expression}")


NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP = {"width": 1280, "height": 900}
PATIENCE_MS = 180_000
HOSTILE = "</script><img src=x onerror=alert(1)>%{x}" + "long" * 20


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = write_study(tmp_path_factory.mktemp("browser"), tasks=("rte", "sst2"))
    for method in ("hybrid", "fo-peft"):
        write_run(
            folder / "runs" / f"{HOSTILE.replace('/', '')}-{method}", method=method, task=HOSTILE
        )
    run = write_run(folder / "runs" / f"rewards-{HOSTILE.replace('/', '')}", method="zo-ft")
    answers = {"before": ["x", "y"], "after": [HOSTILE + "\n" * 3 + HOSTILE, "short"]}
    add_rewards(run, prompts=[HOSTILE * 20, "b?"], **answers)
    write_report([folder], folder / "report.html")
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def opened(address):
    """Open the page once. Return it with the list of messages, requests and errors."""
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    said = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, args=ARGUMENTS, timeout=PATIENCE_MS
        )
        page = browser.new_page(viewport=DESKTOP, color_scheme="light")
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: request.url != address and said.append(request.url))
        page.goto(address)
        until(
            page,
            "[...document.querySelectorAll('.canvas')].every(c => c.querySelector('.main-svg'))",
        )
        yield page, said
        browser.close()


@pytest.fixture
def page(opened):
    """Return the page on a light desktop.

    At the end of the test the list of messages, requests and errors must be empty.
    """
    page, said = opened
    page.set_viewport_size(DESKTOP)
    page.emulate_media(color_scheme="light", media="screen")
    yield page
    assert said == []


def values(table, key):
    """Return the sort keys of one column of a table, from top to bottom."""
    return table.evaluate(
        "(t, k) => { const i = t.querySelector(`[data-key=${k}]`).cellIndex;"
        " return [...t.tBodies[0].rows].map(r => r.cells[i].dataset.value ?? null) }",
        key,
    )


def test_tables_sort_by_mouse_and_by_keyboard(page):
    table = page.locator("table").first
    header = table.locator("[data-key=accuracy]")
    assert header.get_attribute("aria-sort") == "none"
    numbers = sorted(map(float, values(table, "accuracy")))
    header.locator("button").click()
    assert list(map(float, values(table, "accuracy"))) == numbers
    assert header.get_attribute("aria-sort") == "ascending"
    header.locator("button").press("Enter")
    assert list(map(float, values(table, "accuracy"))) == numbers[::-1]
    assert header.get_attribute("aria-sort") == "descending"
    # Tab moves from the first heading to the second, and Space sorts.
    table.locator("[data-key=method] button").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert header.get_attribute("aria-sort") == "none"
    tasks = values(table, "task")
    assert tasks == sorted(tasks, key=str.lower)
    # Unknown values come last in both directions.
    for _ in range(2):
        table.locator("[data-key=adapter_lr] button").click()
        rates = values(table, "adapter_lr")
        num_known = sum(rate is not None for rate in rates)
        assert 0 < num_known < len(rates)
        assert None not in rates[:num_known]


def test_hovering_shows_a_tooltip_and_axes_switch(page):
    figure = page.locator("[data-figure=curves]")
    figure.scroll_into_view_if_needed()
    figure.locator("select").select_option(label="rte")
    point = figure.locator(".scatterlayer .point").last
    box = point.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2 - 3, box["y"] + 3)
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tooltip = figure.locator(".hoverlayer .hovertext")
    tooltip.first.wait_for()
    assert "dev loss" in tooltip.first.text_content()
    title = figure.locator(".xtitle")
    assert title.text_content() == "steps"
    figure.get_by_text("forward-equivalents", exact=True).first.click()
    until(page, "document.querySelector('[data-figure=curves] .xtitle').textContent != 'steps'")
    assert title.text_content() == "forward-equivalents"
    figure.locator("input:checked").press("ArrowRight")
    until(
        page, "document.querySelector('[data-figure=curves] .xtitle').textContent == 'training, s'"
    )


def colours(page):
    return page.evaluate(
        "[getComputedStyle(document.body).backgroundColor,"
        " getComputedStyle(document.querySelector('.xtick text')).fill]"
    )


def test_dark_and_light_follow_the_reader_also_while_the_page_is_open(page):
    light = colours(page)
    page.emulate_media(color_scheme="dark")
    until(
        page, "c => getComputedStyle(document.querySelector('.xtick text')).fill != c", arg=light[1]
    )
    dark = colours(page)
    page.emulate_media(color_scheme="light")
    until(
        page, "c => getComputedStyle(document.querySelector('.xtick text')).fill == c", arg=light[1]
    )

    def brightness(colour):
        return sum(map(int, colour[4:-1].split(",")))

    assert brightness(dark[0]) < 150 < 600 < brightness(light[0])
    assert brightness(light[1]) < 300 < 600 < brightness(dark[1])


def test_a_phone_scrolls_in_one_direction_only(page):
    page.set_viewport_size({"width": 375, "height": 812})
    until(page, "document.querySelector('.canvas .main-svg').clientWidth < 375")
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    # Tables scroll by themselves, and the keyboard can reach them.
    wide = page.locator(".scroll").first
    assert wide.evaluate("e => e.scrollWidth > e.clientWidth && e.tabIndex == 0")


def test_hostile_names_are_shown_as_they_are(page):
    assert page.locator("img").count() == 0
    assert HOSTILE in page.locator("table").first.text_content()
    labels = page.locator("[data-figure=differences] .ytick").all_text_contents()
    assert HOSTILE in labels


def test_long_answers_open_and_figures_of_rewards_switch(page):
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = false)")
    section = page.locator("section[aria-labelledby=rewards-title]")
    table = section.locator("table").first
    assert table.locator("tbody tr").count() == 2
    long = table.locator("td details").first
    full, summary = long.locator("div"), long.locator("summary")
    assert not full.is_visible()
    summary.focus()
    page.keyboard.press("Enter")
    assert full.is_visible()
    assert full.text_content() == HOSTILE + "\n" * 3 + HOSTILE
    assert not summary.locator("span").is_visible()
    summary.click()
    assert not full.is_visible()
    # Short texts have nothing to open, and while nothing is opened, no training sample is seen.
    assert table.locator("tr", has_text="short").locator("td details").count() == 0
    samples = section.locator("table").last
    assert not samples.is_visible()
    section.locator("details > summary", has_text="rewards-").last.click()
    assert samples.is_visible()
    title = section.locator(".ytitle")
    assert title.text_content() == "reward"
    section.locator("select").select_option(label="drift, nats per token")
    until(
        page,
        "document.querySelector('[data-figure=rewards] .ytitle').textContent != 'reward'",
    )
    assert title.text_content() == "drift, nats per token"


def test_the_page_prints(page):
    page.emulate_media(color_scheme="dark")
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert colours(page)[0] == "rgb(255, 255, 255)"
    until(page, "getComputedStyle(document.querySelector('.xtick text')).fill == 'rgb(29, 37, 48)'")
