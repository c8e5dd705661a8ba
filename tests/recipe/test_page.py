"""The page of a small run in a headless browser: quiet, whole on every screen, reached by keyboard, sorted, filtered."""

import csv
import itertools
import shutil
import time

import numpy as np
import pytest
from browser import browser, cut, needs_browser, requests, show, stops
from small_runs import SMALL, run

from flax_hmog.recipe.config import EM, Gradient, Model
from flax_hmog.recipe.report import report_run

pytestmark = [pytest.mark.browser, needs_browser]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    model = Model(lat_dim=3, n_components=6, n_clusters=4)
    heads = SMALL.heads[:1]
    run(folder / "run", model=model, em=EM(max_steps=3), gradient=Gradient(epochs=2), heads=heads, baselines=False)
    report_run(folder / "run")
    return folder


@pytest.fixture(scope="module")
def opened(folder):
    """The browser, for all tests of this module."""
    with browser(folder / "downloads") as driver:
        yield driver


@pytest.fixture
def page(opened, folder):
    """The page, just opened."""
    show(opened, 1280)
    opened.get((folder / "run" / "report.html").as_uri())
    return opened


def cells(page, column, table="table"):
    """Texts of a column of a table, as shown."""
    script = "return [...document.querySelector(arguments[0]).tBodies[0].rows].filter((r) => !r.hidden).map((r) => r.cells[arguments[1]].textContent.trim())"
    return page.execute_script(script, table, column)


def element(page, selector):
    return page.find_element("css selector", selector)


def press(page, *keys):
    from selenium.webdriver import ActionChains, Keys

    ActionChains(page).send_keys(*(getattr(Keys, key, key) for key in keys)).perform()


def test_the_page_is_quiet_and_asks_for_nothing(page):
    assert [entry["message"] for entry in page.get_log("browser")] == []
    asked = requests(page)
    assert page.current_url in asked
    assert [url for url in asked if not url.startswith(("file://", "data:"))] == []
    assert {url for url in asked if url.startswith("file://")} == {page.current_url}


@pytest.mark.parametrize(("width", "scheme"), list(itertools.product((390, 768, 1280), ("light", "dark"))))
def test_nothing_is_cut_on_any_screen(page, width, scheme):
    show(page, width, scheme)
    for details in page.find_elements("css selector", "details"):
        page.execute_script("arguments[0].open = true", details)
    time.sleep(0.1)
    assert cut(page) == [0, []]


@pytest.mark.parametrize("width", [390, 1280])
def test_whatever_the_keyboard_reaches_and_every_picture_has_a_name(page, width):
    show(page, width)
    for details in page.find_elements("css selector", "details"):
        page.execute_script("arguments[0].open = true", details)
    time.sleep(0.1)
    found = list(stops(page))
    assert len(found) > 20
    assert [role for role, name in found if not name.strip()] == []
    nameless = "[...document.querySelectorAll('[role=img], img, canvas')].filter((e) => !e.getAttribute('aria-label'))"
    assert page.execute_script(f"return {nameless}.length") == 0


CONTRAST = """
const style = getComputedStyle(document.documentElement), pen = document.createElement('canvas').getContext('2d');
const light = (name) => {
  pen.fillStyle = style.getPropertyValue(name).trim();
  const part = [1, 3, 5].map((i) => parseInt(pen.fillStyle.slice(i, i + 2), 16) / 255);
  const [r, g, b] = part.map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
};
return arguments[0].map((name) => Math.min(...['--page', '--stripe'].map((behind) => {
  const [a, b] = [light(name), light(behind)];
  return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
})));
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_stand_out(page, scheme):
    show(page, 1280, scheme)
    assert min(page.execute_script(CONTRAST, [f"--c{i}" for i in range(10)] + ["--control", "--accent"])) >= 3
    assert min(page.execute_script(CONTRAST, ["--ink", "--muted"])) >= 4.5


def test_tables_sort_by_their_headings(page):
    before = [int(text) for text in cells(page, 1)]
    assert before == sorted(before, reverse=True)
    heading = element(page, "table th:nth-child(2)")
    page.execute_script("arguments[0].querySelector('button').focus()", heading)
    press(page, "ENTER")
    assert [int(text) for text in cells(page, 1)] == sorted(before)
    assert heading.get_attribute("aria-sort") == "ascending"
    press(page, "ENTER")
    assert [int(text) for text in cells(page, 1)] == sorted(before, reverse=True)
    assert heading.get_attribute("aria-sort") == "descending"


def test_tables_filter_by_words(page):
    table = "table[data-name$=clusters-table-2]"
    field = element(page, "input[aria-label='Filter: Members, row by row']")
    page.execute_script("document.querySelector('details').open = true")
    count = len(cells(page, 1, table))
    field.send_keys("doubtful")
    assert set(cells(page, 1, table)) == {"doubtful"}
    assert element(page, "details .count").text == f"{len(cells(page, 1, table))} of {count} rows"
    field.send_keys(" nowhere")
    assert cells(page, 1, table) == []


def test_a_table_is_downloaded_as_csv(page, folder):
    shutil.rmtree(folder / "downloads", ignore_errors=True)
    element(page, "button[aria-label='Download as csv: Clusters by size']").click()
    path = folder / "downloads" / "1-clusters-table-1.csv"
    for _ in range(100):
        if path.is_file() and path.stat().st_size:
            break
        time.sleep(0.05)
    header, *rows = csv.reader(path.read_text().splitlines())
    assert header[:4] == ["cluster", "rows", "share [%]", "certainty"]
    assert [row[0] for row in rows] == cells(page, 0)
    assert sum(int(row[1]) for row in rows) == 1797
    assert sum(float(row[2]) for row in rows) == pytest.approx(100)


def test_a_cluster_that_is_chosen_leaves_the_others_dim(page):
    button = element(page, "[data-pick='2']")
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    groups = page.execute_script("return [...document.querySelectorAll('.dim')].map((e) => e.dataset.group)")
    assert {"0", "1", "3"} <= set(groups)
    assert "2" not in groups
    assert "Cluster 2 is chosen." in element(page, "#chosen").text
    element(page, "#chosen button").click()
    assert page.find_elements("css selector", ".dim") == []


def test_the_map_shows_the_row_below_the_pointer(page):
    from selenium.webdriver import ActionChains

    canvas, tip = element(page, ".map canvas"), element(page, ".map .tip")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    data = "JSON.parse(document.querySelector('.map script').textContent)"
    points = page.execute_script(
        f"const d = {data}; return [d.axes[0].values, d.axes[1].values, d.details.row, d.groups]"
    )
    across, up = np.array(points[0]) / 10000, np.array(points[1]) / 10000
    far = np.hypot(across[:, None] - across, up[:, None] - up) + np.eye(len(up))
    alone = int(far.min(axis=1).argmax())  # a point with nothing near it
    width, height = canvas.size["width"], canvas.size["height"]
    x, y = 58 + across[alone] * (width - 72), 10 + (1 - up[alone]) * (height - 56)
    move = ActionChains(page).move_to_element_with_offset(canvas, round(x - width / 2), round(y - height / 2))
    move.perform()
    assert f"row {points[2][alone]}" in tip.text.splitlines()
    assert len(tip.find_elements("css selector", ".thumb")) == 1
    move.click().perform()
    assert f"Cluster {points[3][alone]} is chosen." in element(page, "#chosen").text


def test_the_map_is_walked_by_keys(page):
    page.execute_script("document.querySelector('.map canvas').focus()")
    press(page, "ARROW_RIGHT")
    first = element(page, ".map .tip").text
    assert "cluster" in first
    press(page, "ARROW_RIGHT")
    assert element(page, ".map .tip").text != first
    assert "row" in element(page, ".map .status").text  # read out
    press(page, "ENTER")
    assert element(page, "#chosen").is_displayed()
    press(page, "ESCAPE")
    assert not element(page, "#chosen").is_displayed()


def test_axes_and_colours_of_the_map_are_chosen(page):
    from selenium.webdriver.support.select import Select

    before = page.execute_script("return document.querySelector('.map canvas').toDataURL()")
    across, up, color, _ = map(Select, page.find_elements("css selector", ".map select"))
    assert [option.text.split()[0] for option in across.options].count("Discriminant") == 3
    across.select_by_index(2)
    up.select_by_index(3)
    assert page.execute_script("return document.querySelector('.map canvas').toDataURL()") != before
    color.select_by_visible_text("label")
    assert element(page, ".map .legend").text.split() == list("0123456789")
