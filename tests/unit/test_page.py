"""The HTML pages in a real browser: mouse, keyboard, two window widths, two color schemes."""

import shutil

import pytest
from handmade import HOSTILE, make_run

from lab.report import html

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (apt-get install chromium)"),
]
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update",
         "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with playwright.sync_playwright() as driver:
        profile = tmp_path_factory.mktemp("profile")
        context = driver.chromium.launch_persistent_context(
            profile, executable_path=CHROMIUM, args=FLAGS
        )
        yield context
        context.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Return the paths of the pages by name."""
    directory = tmp_path_factory.mktemp("runs")
    names = {"hostile": HOSTILE, "hundred": [f"class number {k}" for k in range(100)]}
    paths = {name: make_run(directory / name, names[name], num_test=1000) for name in names}
    return {name: html.write(path) for name, path in paths.items()}


@pytest.fixture
def open_page(browser, pages):
    """Open a page; fail if it requests anything but itself, or logs to the console."""
    tabs, problems = [], []

    def call(name):
        page = browser.new_page()
        tabs.append(page)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        url = pages[name].as_uri()
        page.on("request", lambda r: problems.append(r.url) if is_external(r.url, url) else None)
        page.goto(url)
        return page

    yield call
    for page in tabs:
        page.close()
    assert problems == []


def is_external(url, page_url):
    return url != page_url and not url.startswith("data:")


def cells(page):
    """Return (true class, predicted class, count) of the buttons of the confusion matrix."""
    script = "all => all.map(b => [...b.dataset.cell.split(','), b.textContent].map(Number))"
    return page.locator("#matrix button").evaluate_all(script)


def selected_cell(page):
    """Return what the page shows of the selected cell: heading, summary, number of images."""
    loaded = "all => all.filter(i => i.complete && i.naturalWidth > 0).length"
    num_images = page.locator("#cell img").evaluate_all(loaded)
    return page.inner_text("#cell h3"), page.inner_text("#cell p"), num_images


@pytest.mark.parametrize("name", ["hostile", "hundred"])
def test_a_click_on_a_cell_shows_its_images(open_page, name):
    page = open_page(name)
    i, j, count = max(cells(page), key=lambda cell: cell[2])
    page.click(f'#matrix button[data-cell="{i},{j}"]')
    page.wait_for_function("[...document.querySelectorAll('#cell img')].every(i => i.complete)")
    heading, summary, num_images = selected_cell(page)
    assert f": {count} (" in heading
    assert 0 < num_images <= min(count, 12)
    assert summary == f"{num_images} of {count} images, sorted by decreasing confidence."
    assert page.inner_text("#status-cells").endswith(summary)  # for screen readers
    assert page.locator('#matrix button[aria-pressed="true"]').count() == 1


def test_the_keyboard_selects_a_cell(open_page):
    page = open_page("hostile")
    first = page.locator("#matrix button").first
    for _ in range(30):
        page.keyboard.press("Tab")
        if first.evaluate("button => button === document.activeElement"):
            break
    else:
        pytest.fail("the Tab key does not reach the matrix")
    (i, j, _), *rest = cells(page)
    page.keyboard.press("ArrowDown")
    below = next(cell for cell in rest if cell[0] > i and cell[1] == j)
    page.keyboard.press("Enter")
    pressed = page.locator('#matrix button[aria-pressed="true"]')
    assert pressed.get_attribute("data-cell") == "{},{}".format(*below)
    assert f": {below[2]} (" in selected_cell(page)[0]
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"  # the focus is visible
    assert page.locator('#matrix button[tabindex="0"]').count() == 1
    page.keyboard.press("Tab")
    assert not page.evaluate("document.activeElement.closest('#matrix')")


def test_a_heading_sorts_its_column_by_click_and_by_keyboard(open_page):
    page = open_page("hundred")
    heading = page.locator("#per-class th", has_text="F1")

    def column():
        return [float(t) for t in page.locator("#per-class td:nth-child(4)").all_inner_texts()]

    before = column()
    heading.locator("button").click()
    assert column() == sorted(before) != before
    assert heading.get_attribute("aria-sort") == "ascending"
    assert page.inner_text("#status-classes") == "Sorted by F1, ascending."
    page.keyboard.press("Enter")  # the button has the focus
    assert column() == sorted(before, reverse=True)
    assert page.locator('#per-class th[aria-sort="none"]').count() == 4
    page.locator("#per-class th button").first.click()
    names = page.locator("#per-class tbody th").all_inner_texts()
    assert names == [f"class number {k}" for k in range(100)]
