"""The report page in a real browser, by its keys and its mouse."""

import json
import urllib.parse

import pytest

from metroem.evaluation.scores import CHUNK_PX
from tests.browser import Browser, find_chromium
from tests.evaluation.report.pages import ABOUT, COLS, HOSTILE, ROWS, make_page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_chromium() is None, reason="no Chromium (Debian: apt-get install chromium)"
    ),
]
PICTURE = "byId('canvas').toDataURL()"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return make_page(folder / "report.html", source="gs://bucket/em")


@pytest.fixture(scope="module")
def chromium():
    with Browser() as browser:
        yield browser


@pytest.fixture
def browser(chromium, page):
    """The page, loaded; whatever it complains about fails the test."""
    chromium.load(page)
    yield chromium
    assert chromium.console == []
    fetched = [url for url in chromium.requests if not url.startswith("data:")]
    assert fetched == [page.absolute().as_uri()]


def text(browser, identity):
    return browser.run(f"byId('{identity}').textContent")


def wait_for_pair(browser, number):
    browser.wait(f"byId('canvas').dataset.shows === '{number}'")


def open_first(browser):
    browser.run("document.querySelector('#pairs tbody tr').click()")
    wait_for_pair(browser, 0)


def test_the_table_lists_the_worst_first_and_sorts_by_a_heading(browser):
    rows = "[...document.querySelectorAll('#pairs tbody a')].map((a) => a.hash)"
    assert browser.run(rows) == ["#0", "#1", "#2"]
    browser.run("document.querySelectorAll('#pairs th button')[1].click()")
    assert browser.run(rows) == ["#2", "#1", "#0"]
    assert browser.run("document.querySelectorAll('#curves svg').length") == 2
    assert browser.run("document.documentElement.scrollWidth") <= 1280


def test_keys_go_to_the_next_pair_and_back(browser):
    open_first(browser)
    assert text(browser, "name") == "x0_y0_z1_MIP1.h5 pair 0: z 1 on 0"
    browser.press("ArrowRight")
    wait_for_pair(browser, 1)
    browser.press("n")
    wait_for_pair(browser, 2)
    assert text(browser, "place") == "3 of 3"
    browser.press("n")  # there is none
    browser.press("ArrowLeft")
    wait_for_pair(browser, 1)
    browser.press("Escape")
    browser.wait("byId('pair').hidden && !byId('overview').hidden")


def test_flicker_shows_src_and_tgt_in_turn(browser):
    open_first(browser)
    src = browser.run(PICTURE)
    assert text(browser, "shown") == "src after"
    browser.press(" ")
    assert text(browser, "shown") == "tgt"
    assert browser.run(PICTURE) != src
    browser.press(" ")
    assert browser.run(PICTURE) == src
    browser.press("f")
    for shown in ("tgt", "src after", "tgt"):
        browser.wait(f"byId('shown').textContent === '{shown}'")
    browser.press("f")
    assert browser.run("timer") is None


def test_every_way_of_looking_draws_another_picture(browser):
    open_first(browser)
    browser.run("location.hash = '#2'")  # has a field, the first has none
    wait_for_pair(browser, 2)
    seen = [browser.run(PICTURE)]
    for key in ("1", "s", "b", "o", "d", "a", "c", "m", "w", "0"):
        browser.press(key)
        seen.append(browser.run(PICTURE))
    assert seen.pop() == seen[-2]  # whole again, as before the worst chunk
    assert len(set(seen)) == len(seen)
    legend = text(browser, "legend")
    for part in ("full colour", "arrows", "CPC before", "defect", "fold"):
        assert part in legend
    keys = browser.run("[...document.querySelectorAll('#keys dd')].length")
    assert keys == 15


def test_the_heat_map_is_drawn_where_its_chunk_is(browser):
    open_first(browser)
    browser.press("c")
    # Chunk (0, 1): cols 64 to 128, which run down; upright it is the second one down.
    place = "(() => { const v = viewer.view; return [v.x + v.scale * 10, "
    place += "v.y + v.scale * 70]; })()"
    x, y = browser.run(place)
    pixel = "[...byId('canvas').getContext('2d').getImageData("
    red, green, blue, _ = browser.run(f"{pixel}{x}, {y}, 1, 1).data]")
    assert not red == green == blue
    cpc = browser.run("viewer.pair.correlation.after")
    assert (len(cpc), len(cpc[0])) == (COLS // CHUNK_PX, ROWS // CHUNK_PX)
    left = browser.run("byId('canvas').getBoundingClientRect().left")
    top = browser.run("byId('canvas').getBoundingClientRect().top")
    browser.mouse("mouseMoved", left + x, top + y)
    # Pixels of mip 1 span 2.
    assert text(browser, "pointer").startswith("x 20, y 140 (mip 0); CPC of the chunk")
    assert f"{cpc[1][0]:.2f}" in text(browser, "pointer")


def test_the_slider_is_dragged_and_a_click_marks_a_place(browser):
    open_first(browser)
    browser.press("s")
    view = browser.run("({...viewer.view, ...viewer.size})")
    line, middle = view["x"] + view["scale"] * view["width"] / 2, 300
    top = browser.run("byId('canvas').getBoundingClientRect().top")
    button = {"button": "left", "buttons": 1, "clickCount": 1}
    browser.mouse("mousePressed", line, middle, **button)
    browser.mouse("mouseMoved", view["x"] + view["scale"] * 10, middle, **button)
    browser.mouse("mouseReleased", view["x"] + view["scale"] * 10, middle, **button)
    assert browser.run("state.share") == pytest.approx(10 / ROWS, abs=0.02)
    at = view["x"] + view["scale"] * 40.5, top + view["y"] + view["scale"] * 20.5
    browser.mouse("mousePressed", *at, **button)
    browser.mouse("mouseReleased", *at, **button)
    # Row 40 of mip 1 is x 80, col 20 is y 40; src is z 1.
    assert "80, 40, 1" in text(browser, "where")


def test_neuroglancer_opens_at_the_worst_chunk(browser):
    open_first(browser)
    href = browser.run("document.querySelector('#where a').href")
    address, _, view = href.partition("#!")
    assert address == "https://neuroglancer-demo.appspot.com/"
    found = json.loads(urllib.parse.unquote(view))
    assert found["layers"][0]["source"] == "precomputed://gs://bucket/em"
    x, y, z = found["position"]
    assert (x, z) == (64.5, 1.5)  # the middle of 64 rows of mip 1; src
    assert found["crossSectionScale"] == 2


def test_names_and_paths_are_shown_as_they_are_and_never_run(tmp_path):
    about = {**ABOUT, "checkpoint_name": HOSTILE, "stages": [HOSTILE, HOSTILE]}
    suffix = f"_{HOSTILE.replace('/', '')}"
    page = make_page(
        tmp_path / "report.html", source=HOSTILE, about=about, suffix=suffix
    )
    with Browser(dark=True) as browser:
        browser.load(page)
        open_first(browser)
        assert text(browser, "name").startswith(f"x0_y0_z1_MIP1{suffix}.h5")
        assert HOSTILE in text(browser, "about") and HOSTILE in text(browser, "where")
        assert (
            browser.run("document.querySelectorAll('script:not([type])').length") == 1
        )
        assert browser.run("document.querySelectorAll('img[onerror]').length") == 0
        # An alert would have kept the page from answering.
        assert browser.console == []
