"""The page in a browser: Debian's Chromium, driven by playwright. Both are optional."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from fedsim.report.document import write_report
from tests.report.test_report import add_quick


playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("needs a Chromium", allow_module_level=True)

pytestmark = pytest.mark.xdist_group("browser")  # one is enough
PHONE, DESK = {"width": 400, "height": 800}, {"width": 1400, "height": 900}


@pytest.fixture(scope="module")
def page_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("results")
    add_quick(folder, seed=0)
    add_quick(folder, seed=1, more=0.02)
    path = write_report(folder)
    assert isinstance(path, Path)
    return path.as_uri()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Any, page_url: str) -> Iterator[Any]:
    """A function that opens the page; whatever the browser complains of fails the test."""
    contexts, complaints = [], []

    def at(viewport: dict[str, int], **settings: Any) -> Any:
        contexts.append(chromium.new_context(viewport=viewport, **settings))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(page_url)
        return page

    yield at
    for context in contexts:
        context.close()
    assert complaints == []


def column(table: Any, place: int) -> list[str]:
    return [row.locator("td").nth(place).inner_text() for row in table.locator("tbody tr").all()]


def test_a_table_sorts_by_number_both_ways_and_by_name(opened: Any) -> None:
    table = opened(DESK).locator("table").first
    head = table.get_by_role("button", name="accuracy", exact=False).first
    place = 2
    numbers = [float(cell.split()[0]) for cell in column(table, place)]
    assert numbers != sorted(numbers)
    head.click()
    assert [float(cell.split()[0]) for cell in column(table, place)] == sorted(numbers)
    assert table.locator("th").nth(place).get_attribute("aria-sort") == "ascending"
    head.click()
    assert [float(cell.split()[0]) for cell in column(table, place)] == sorted(numbers, reverse=True)
    table.get_by_role("button", name="method").click()
    assert column(table, 0) == sorted(column(table, 0))
    assert table.locator("th").nth(place).get_attribute("aria-sort") is None


def test_a_method_is_hidden_in_all_figures_of_its_part_and_shown_again(opened: Any) -> None:
    page = opened(DESK)
    choice = page.get_by_role("checkbox", name="fedavg")
    value = choice.get_attribute("value")
    lines = page.locator(f'figure .wide-only [id$="-{value}"]')
    others = page.locator('figure .wide-only [id$="-method-0"]')
    assert lines.count() == 3 and lines.first.is_visible()
    choice.uncheck()
    assert not any(line.is_visible() for line in lines.all()) and others.first.is_visible()
    bands = page.locator(f'figure .wide-only [id$="-{value}-band"]')
    assert bands.count() == 3 and not bands.first.is_visible()
    choice.check()
    assert all(line.is_visible() for line in lines.all())


def test_a_figure_is_kept_as_svg_and_its_numbers_as_csv(opened: Any, tmp_path: Path) -> None:
    page = opened(DESK, color_scheme="dark", accept_downloads=True)
    figure = page.locator("figure#figure-0-accuracy-rounds")
    with page.expect_download() as waiting:
        figure.get_by_role("button", name="figure (svg)").click()
    waiting.value.save_as(tmp_path / "figure.svg")
    drawn = (tmp_path / "figure.svg").read_text()
    assert waiting.value.suggested_filename == "figure-0-accuracy-rounds.svg"
    assert ElementTree.fromstring(drawn).get("color") == "#000000", "black on white from a dark page, too"
    with page.expect_download() as waiting:
        figure.get_by_role("link", name="its numbers").click()
    waiting.value.save_as(tmp_path / "numbers.csv")
    lines = (tmp_path / "numbers.csv").read_text().splitlines()
    assert lines[0] == 'method,rounds,"accuracy, %",from,to' and len(lines) == 1 + 5 * 4
    assert lines[1] == "fedgrow (paper),0,10,10,10"


def test_a_table_is_copied_as_csv(opened: Any) -> None:
    page = opened(DESK, permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="copy as csv").first.click()
    page.get_by_role("button", name="copied").wait_for()
    lines = page.evaluate("navigator.clipboard.readText()").splitlines()
    assert lines[0].startswith('"method","leaves","accuracy ± ci, %"') and lines[1].startswith('"fedgrow (paper)","-"')


@pytest.mark.parametrize("viewport, shown", [(PHONE, ".narrow"), (DESK, ".wide-only")])
@pytest.mark.parametrize("scheme, background", [("light", "rgb(255, 255, 255)"), ("dark", "rgb(22, 24, 27)")])
def test_figures_fit_the_screen_and_have_its_colours(
    viewport: dict[str, int], shown: str, scheme: str, background: str, opened: Any
) -> None:
    page = opened(viewport, color_scheme=scheme)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == background
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"], "no sideways scrolling"
    hidden = {".narrow": ".wide-only", ".wide-only": ".narrow"}[shown]
    assert page.locator(f"figure {hidden} svg").first.is_hidden()
    for drawn in page.locator(f"figure {shown} svg").all():
        assert drawn.is_visible() and drawn.bounding_box()["width"] <= viewport["width"]
    letters = page.locator(f"figure {shown} svg text").first
    ink = letters.evaluate("each => getComputedStyle(each).fill")
    assert ink == page.evaluate("getComputedStyle(document.body).color")
    assert letters.bounding_box()["height"] >= 9, "can be read"


def test_all_can_be_read_where_nothing_runs(opened: Any) -> None:
    page = opened(PHONE, java_script_enabled=False)
    assert page.locator("fieldset").first.is_hidden() and page.get_by_role("button").count() == 0
    assert page.locator("table").first.is_visible() and page.locator("figure .narrow svg").first.is_visible()
    assert page.get_by_role("link", name="its numbers").first.is_visible()


def test_pictures_are_told_in_words(opened: Any) -> None:
    for picture in opened(DESK).get_by_role("img").all():
        assert len(picture.get_attribute("aria-label")) > 30
