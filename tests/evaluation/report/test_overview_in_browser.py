"""What the report opens with, its keys and its explanations, in a real browser."""

import pytest

from metroem.evaluation.evaluate import Coverage
from tests.browser import Browser, find_chromium
from tests.evaluation.report.pages import ABOUT, make_page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_chromium() is None, reason="no Chromium (Debian: apt-get install chromium)"
    ),
]
FOCUS = "document.activeElement"
ROWS = "[...document.querySelectorAll('#pairs tbody tr')]"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A good pair, one that alignment made worse, one half aligned; two sections."""
    return make_page(
        tmp_path_factory.mktemp("page") / "report.html",
        shares=(1.0, -1.0, 0.5),
        roles=("trained on", "held out", "held out"),
        known=(1.0, -1.0),
        about={**ABOUT, "coverage": Coverage(3, 7, 20, True)},
    )


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


def wait_for(browser, number):
    browser.wait(f"byId('canvas').dataset.shows === '{number}'")


def test_the_page_opens_with_the_worst_places(browser):
    first = "document.querySelector('#overview section:not([hidden]) h2')"
    assert browser.run(f"{first}.textContent") == "Worst places"
    cpc = browser.run("data.worst.map(({ cpc }) => cpc)")
    # Two chunks a pair.
    assert len(cpc) == 6 and cpc == sorted(cpc)
    assert browser.run("document.querySelectorAll('#worst .place').length") == 6
    assert browser.run("data.worst[0].pair") == 1


def test_one_click_goes_to_the_worst_place_enlarged(browser):
    browser.run("document.querySelector('#worst a').click()")
    wait_for(browser, 1)
    place = browser.run("data.worst[0]")
    view = browser.run("viewer.view")
    width, height = browser.run(
        "[viewer.canvas.clientWidth, viewer.canvas.clientHeight]"
    )
    assert view["scale"] == 3
    assert view["x"] + 3 * place["x"] == width / 2
    assert view["y"] + 3 * place["y"] == height / 2
    # Pixels of mip 1 span 2; src of pair 1 is z 2.
    where = browser.run("byId('where').textContent")
    assert f"{2 * place['x']}, {2 * place['y']}, 2" in where


def test_pairs_made_worse_come_first_and_are_marked_by_words(browser):
    order = browser.run(ROWS + ".map((row) => row.querySelector('a').hash)")
    assert order == ["#1", "#2", "#0"]
    marks = browser.run(ROWS + ".map((row) => row.cells[1].innerText)")
    assert ["made worse" in mark for mark in marks] == [True, False, False]
    assert ["held out" in mark for mark in marks] == [True, True, False]
    assert "trained on" in marks[2]


def test_what_a_reader_must_know_first_is_said_above_all(browser):
    notes = browser.run("[...byId('notes').children].map((note) => note.textContent)")
    assert notes == [
        "Stopped: 3 of 7 pairs. The same command resumes from here.",
        "7 of 20 pairs, spread evenly over the data set (--max_pairs).",
        "1 of 3 pairs were trained on: their figures flatter.",
    ]


def test_a_warped_section_has_pictures(browser):
    rows = "[...document.querySelectorAll('#known tbody tr')]"
    names = browser.run(rows + ".map((row) => row.cells[1].innerText)")
    assert "section z 1" in names[0] and "made worse" in names[0]
    browser.run("document.querySelector('#known tbody tr').click()")
    wait_for(browser, 4)
    assert "EPE mean, px" in browser.run("byId('figures').textContent")
    browser.press("ArrowRight")
    wait_for(browser, 3)
    assert browser.run("byId('place').textContent") == "2 of 2"


def test_figures_are_explained_when_they_are_pointed_at_or_have_the_focus(browser):
    heading = "document.querySelector('#pairs th button')"
    browser.run(f"{heading}.focus()")
    assert "without alignment" in browser.run("byId('tip').textContent")
    assert browser.run(f"{heading}.getAttribute('aria-describedby')") == "tip"
    browser.run(f"{heading}.blur()")
    assert browser.run("byId('tip').hidden")
    tile = "document.querySelector('#tiles .explained')"
    x, y = browser.run(
        f"(() => {{ {tile}.scrollIntoView({{block: 'center'}});"
        f"const b = {tile}.getBoundingClientRect(); return [b.x + 5, b.y + 5]; }})()"
    )
    browser.mouse("mouseMoved", x, y)
    assert "Good: higher than before" in browser.run("byId('tip').textContent")
    browser.mouse("mouseMoved", 1, 1)
    assert browser.run("byId('tip').hidden")
    figures = "#tiles span, #pairs th button, #known th span, #sets th span"
    unknown = f"[...document.querySelectorAll('{figures}')]"
    unknown += ".filter((one) => !one.matches('.explained')).map((e) => e.textContent)"
    assert browser.run(unknown) == [
        *("", "section", "image set", "pairs", "px", "volume"),
    ]


def test_space_and_arrows_stay_with_the_control_that_has_the_focus(browser):
    browser.run("location.hash = '#1'")
    wait_for(browser, 1)
    assert browser.run(f"{FOCUS}.id") == "canvas"
    shown = browser.run("byId('shown').textContent")
    browser.run("byId('next').focus()")
    browser.press(" ")  # the button is pressed
    wait_for(browser, 2)
    browser.press("ArrowLeft")
    assert browser.run("location.hash") == "#2"
    assert browser.run("byId('shown').textContent") == shown
    browser.run("document.querySelector('#layers input').focus()")
    browser.press(" ")
    assert browser.run("byId('shown').textContent") == shown
    browser.run("byId('canvas').focus()")
    browser.press(" ")
    assert browser.run("byId('shown').textContent") == "tgt"
    browser.press("ArrowRight")
    wait_for(browser, 0)


def test_escape_closes_and_keeps_place_and_focus(browser):
    link = "document.querySelector('#pairs tbody tr:nth-child(3) a')"
    browser.run(f"{link}.scrollIntoView()")
    browser.run(f"{link}.focus({{ preventScroll: true }})")
    browser.wait("window.scrollY > 0")
    top = browser.run("window.scrollY")
    browser.run(f"{link}.click()")
    wait_for(browser, 0)
    browser.run("byId('next').focus()")
    browser.press("Escape")
    browser.wait("byId('pair').hidden")
    assert browser.run("window.scrollY") == top > 0
    assert browser.run(f"{FOCUS} === {link}")


def test_a_curve_of_one_point_is_a_dot(browser):
    # The second curve has one point of each set.
    drawn = "document.querySelectorAll('#curves svg')[1].querySelectorAll('circle')"
    assert browser.run(f"[...{drawn}].map((dot) => dot.getAttribute('class'))") == [
        *("training", "validation"),
    ]


@pytest.mark.parametrize("width", [1000, 480])
def test_the_page_fits_narrow_windows(page, width):
    with Browser(width, 760) as browser:
        browser.load(page)
        assert browser.run("document.documentElement.scrollWidth") == width
        browser.run("document.querySelector('#worst a').click()")
        wait_for(browser, 1)
        assert browser.run("document.documentElement.scrollWidth") == width
        canvas = browser.run("[viewer.canvas.clientWidth, viewer.canvas.clientHeight]")
        assert min(canvas) >= 400
