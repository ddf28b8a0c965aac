"""The page of `hf-visual-peft report` in a headless browser."""

import shutil

import datasets
import numpy as np
import pytest
from PIL import Image
from test_report import METHODS, comparison

from hf_visual_peft.report.page import page as page_of
from hf_visual_peft.report.reading import read_results


playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("vl_convert")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
DRAWN = "document.querySelectorAll('.chart svg').length === specs.length"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as engine:
        opened = engine.chromium.launch(executable_path=CHROMIUM)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The page of a comparison with images."""
    folder = tmp_path_factory.mktemp("page") / "one"
    state = comparison(folder)
    images = [Image.new("RGB", (300, 200), (index, 0, 0)) for index in range(40)]
    whole = datasets.Dataset.from_dict({"image": images, "label": state["data"]["labels"]})
    datasets.DatasetDict({"test": whole}).save_to_disk(folder / "data")
    return save(folder)


def save(folder):
    file = folder / "page.html"
    file.write_text(page_of(read_results([folder]), "hf-visual-peft report one"), encoding="utf-8")
    return file


@pytest.fixture
def opened(browser):
    """Opens a file on a screen of a width; what the browser reports is an error."""
    faults, contexts = [], []

    def call(file, width=1280, scheme="light"):
        contexts.append(
            browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
        )
        page = contexts[-1].new_page()
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("requestfailed", lambda request: faults.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_function(DRAWN)
        return page

    yield call
    for context in contexts:
        context.close()
    assert faults == []


def names(page):
    return page.locator("#methods tbody tr:visible td:first-child").evaluate_all(
        "all => all.map(a => a.dataset.value)"
    )


def test_columns_sort_by_mouse_and_keyboard(opened, written):
    page = opened(written)
    assert names(page) == list(METHODS)  # best first
    head = page.locator("#methods th", has_text="trained numbers")
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert names(page) == list(METHODS)[::-1]
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert names(page) == list(METHODS)
    page.locator("#methods th", has_text="method").first.locator("button").click()
    assert names(page) == sorted(METHODS, reverse=True)
    assert head.get_attribute("aria-sort") == "none"


def test_the_filter_hides_rows_and_tells_their_number(opened, written):
    page = opened(written)
    page.fill("#filter", "FIT")
    assert names(page) == ["bitfit"]
    assert page.inner_text("#count") == "1 of 3"
    page.fill("#filter", "")
    assert page.inner_text("#count") == "3 of 3"


def test_commands_open_by_keyboard(opened, written):
    page = opened(written)
    shown = page.locator("#methods tbody details pre").first
    assert not shown.is_visible()
    page.locator("#methods tbody summary").first.focus()
    page.keyboard.press("Enter")
    assert shown.is_visible()
    assert "hf-visual-peft compare photos" in shown.inner_text()


def luminance(colour):
    """By WCAG 2, of `rgb(r, g, b)`."""
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(opened, written, scheme):
    page = opened(written, scheme=scheme)
    style = "(node, name) => getComputedStyle(node)[name]"
    back = luminance(page.locator("body").evaluate(style, "backgroundColor"))
    assert (back > 0.5) == (scheme == "light")
    texts = [(page.locator("body"), "color"), (page.locator(".chart svg text").first, "fill")]
    for node, name in texts:
        bright, dark = sorted([back, luminance(node.evaluate(style, name))], reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 7


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_wider_than_the_screen(opened, written, width):
    page = opened(written, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("ul.pictures img").count() > 0
    assert all(page.locator("ul.pictures img").evaluate_all("all => all.map(a => a.naturalWidth > 0)"))
    drawn = page.locator(".chart svg").evaluate_all("all => all.map(a => a.getBoundingClientRect().right)")
    assert max(drawn) <= width


def test_30_runs_of_1000_classes_are_drawn(opened, tmp_path):
    comparison(tmp_path / "one", classes=1000, images=5000, methods=[f"m{number:02}" for number in range(30)])
    page = opened(save(tmp_path / "one"))
    assert len(names(page)) == 30
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
