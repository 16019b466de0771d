"""The pages of runs in a real browser: clicked, typed at, and looked at in two widths."""

import shutil

import pytest
from handmade import HOSTILE, make_run

from lab.report import compare, html
from lab.report.run_reader import read_run

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (apt-get install chromium)")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update",
         "--disable-sync"]  # fmt: skip
WIDTHS = (1280, 390)  # pixels, of a laptop and of a telephone


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
    """The files of the pages, by name."""
    folder = tmp_path_factory.mktemp("runs")
    names = {"hostile": HOSTILE, "hundred": [f"class number {k}" for k in range(100)]}
    paths = {name: make_run(folder / name, names[name], num_test=1000) for name in names}
    found = {name: html.write(path) for name, path in paths.items()}
    runs = [read_run(path) for path in paths.values()]
    html.write_comparison(folder, runs, compare.rows(runs))
    return found | {"comparison": folder / compare.COMPARISON_PAGE}


@pytest.fixture
def opened(browser, pages):
    """Opens a page; fails where it asked for anything but itself, or wrote to the console."""
    tabs, wrong = [], []

    def call(name):
        page = browser.new_page()
        tabs.append(page)
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        url = pages[name].as_uri()
        page.on("request", lambda r: wrong.append(r.url) if fetched(r.url, url) else None)
        page.goto(url)
        return page

    yield call
    for page in tabs:
        page.close()
    assert wrong == []


def fetched(url, own):
    return url != own and not url.startswith("data:")


def cells(page):
    """(true class, predicted class, count) of the matrix's buttons."""
    script = "all => all.map(b => [...b.dataset.cell.split(','), b.textContent].map(Number))"
    return page.locator("#matrix button").evaluate_all(script)


def behind(page):
    """What the page shows of the chosen cell: its heading, its sentence, number of pictures."""
    loaded = "all => all.filter(i => i.complete && i.naturalWidth > 0).length"
    pictures = page.locator("#behind img").evaluate_all(loaded)
    return page.inner_text("#behind h3"), page.inner_text("#behind p"), pictures


@pytest.mark.parametrize("name", ["hostile", "hundred"])
def test_a_click_on_a_cell_shows_the_pictures_behind_it(opened, name):
    page = opened(name)
    i, j, count = max(cells(page), key=lambda cell: cell[2])
    page.click(f'#matrix button[data-cell="{i},{j}"]')
    page.wait_for_function("[...document.querySelectorAll('#behind img')].every(i => i.complete)")
    heading, sentence, pictures = behind(page)
    assert f": {count} (" in heading
    assert 0 < pictures <= min(count, 12)
    assert sentence == f"{pictures} of {count} pictures shown, the most confident first."
    assert page.inner_text("#said-cells").endswith(sentence)  # what a screen reader says
    assert page.locator('#matrix button[aria-pressed="true"]').count() == 1


def test_the_keyboard_does_the_same(opened):
    page = opened("hostile")
    first = page.locator("#matrix button").first
    for _ in range(30):
        page.keyboard.press("Tab")
        if first.evaluate("button => button === document.activeElement"):
            break
    else:
        pytest.fail("the Tab key does not reach the matrix")
    (i, j, _), *others = cells(page)
    page.keyboard.press("ArrowDown")
    below = next(cell for cell in others if cell[0] > i and cell[1] == j)
    page.keyboard.press("Enter")
    pressed = page.locator('#matrix button[aria-pressed="true"]')
    assert pressed.get_attribute("data-cell") == "{},{}".format(*below)
    assert f": {below[2]} (" in behind(page)[0]
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"  # the focus is seen
    assert page.locator('#matrix button[tabindex="0"]').count() == 1
    page.keyboard.press("Tab")
    assert not page.evaluate("document.activeElement.closest('#matrix')")


def test_a_head_sorts_its_column_by_click_and_by_keyboard(opened):
    page = opened("hundred")
    head = page.locator("#per-class th", has_text="F1")

    def column():
        return [float(t) for t in page.locator("#per-class td:nth-child(4)").all_inner_texts()]

    before = column()
    head.locator("button").click()
    assert column() == sorted(before) != before
    assert head.get_attribute("aria-sort") == "ascending"
    assert page.inner_text("#said-classes") == "Sorted by F1, ascending."
    page.keyboard.press("Enter")  # the button has the focus
    assert column() == sorted(before, reverse=True)
    assert page.locator('#per-class th[aria-sort="none"]').count() == 4
    page.locator("#per-class th button").first.click()
    names = page.locator("#per-class tbody th").all_inner_texts()
    assert names == [f"class number {k}" for k in range(100)]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["hostile", "hundred", "comparison"])
def test_no_page_scrolls_sideways(opened, name, width):
    page = opened(name)
    page.set_viewport_size({"width": width, "height": 800})
    for details in page.locator("details").all():
        details.evaluate("d => d.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if name == "hundred":  # ... but its matrix does
        assert page.evaluate("(m => m.scrollWidth > m.clientWidth)(matrix.parentElement)")


def test_what_counts_is_in_sight_and_what_is_not_says_so(opened):
    page = opened("comparison")
    box = page.locator(".scroll").first

    def ends(selector):
        """The left and right ends of what a selector finds, in pixels of the window."""
        found = page.locator(selector).first.bounding_box()
        return found["x"], found["x"] + found["width"]

    page.set_viewport_size({"width": 1200, "height": 800})
    for head in ("accuracy", "macro-F1", "to best", "chosen on"):
        assert ends(f".runs th:has-text('{head}')")[1] <= ends(".scroll")[1]
    page.set_viewport_size({"width": 390, "height": 800})
    hint = box.locator(".hint")
    playwright.expect(hint).to_be_visible()
    box.evaluate("b => b.scrollLeft = b.scrollWidth")
    assert ends(".runs tbody th")[0] == pytest.approx(ends(".scroll")[0], abs=1)  # the run's name
    page.set_viewport_size({"width": 1200, "height": 800})
    few = "all => all.forEach(cell => cell.remove())"
    page.locator(".runs :is(th, td):nth-child(n + 7)").evaluate_all(few)
    playwright.expect(hint).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_its_background(opened, scheme):
    """A contrast of 4.5, as WCAG 2.1 asks for, of the colours that text has."""
    page = opened("hostile")
    page.emulate_media(color_scheme=scheme)
    ratios = page.evaluate(CONTRAST)
    assert set(ratios) == {"--ink", "--faint", "--accent"}
    assert min(ratios.values()) >= 4.5
    assert page.evaluate("getComputedStyle(document.body).color") == (
        "rgb(27, 31, 36)" if scheme == "light" else "rgb(232, 234, 237)"
    )


CONTRAST = """() => {
  const style = getComputedStyle(document.documentElement);
  const light = name => {
    const hex = style.getPropertyValue(name).trim().slice(1);
    const parts = hex.length === 3 ? [...hex].map(c => c + c) : hex.match(/../g);
    const [r, g, b] = parts.map(p => parseInt(p, 16) / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const ratio = (a, b) => Math.max(a, b) / Math.min(a, b);
  return Object.fromEntries(["--ink", "--faint", "--accent"].map(name =>
    [name, Math.min(...["--page", "--card", "--mark"].map(b => ratio(light(name), light(b))))]));
}"""


def test_a_comparison_links_to_the_pages_of_its_runs(opened, pages):
    page = opened("comparison")
    links = page.locator("tbody a").evaluate_all("all => all.map(a => a.href)")
    assert sorted(links) == sorted(pages[name].as_uri() for name in ("hostile", "hundred"))
