"""The page of a check in a real browser."""

from dataclasses import replace

import numpy as np
import pytest

from metroem.stack.check import CheckStep
from metroem.stack.check_plan import plan_check
from metroem.stack.requests import CheckRequest
from tests.browser import Browser, find_chromium
from tests.stack.checks import run_report
from tests.stack.textures import waves, write_sections
from tests.volumes import make_volume

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_chromium() is None, reason="no Chromium (Debian: apt-get install chromium)"
    ),
]
ROWS, COLS, NUM = 300, 420, 9
BLANK, MOVED = 3, 6


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    sections = [waves(ROWS, COLS) for _ in range(NUM)]
    sections[BLANK][:] = 0
    sections[MOVED] = waves(ROWS, COLS, (5, 0))
    raw = [waves(ROWS, COLS, (0, 2.0 * (z % 2))) for z in range(NUM)]
    field = np.full((NUM, 2, ROWS, COLS), 2, np.float32)
    chunk = (ROWS, COLS, 1)
    request = CheckRequest(
        cv_path=write_sections(folder / "image", sections),
        dst_path=str(folder),
        before=write_sections(folder / "raw", raw),
        field_path=make_volume(
            folder / "field", [field], chunk=chunk, resolution=(8, 8, 40)
        ),
    )
    check = CheckStep(replace(plan_check(request), unplaced=(MOVED,)))
    for task in check.tasks():
        check.run(task)
    run_report(check)
    return folder / "report.html"


@pytest.fixture(params=[1440, 1000, 480])
def browser(request, page):
    """The page at one width; whatever it complains about fails the test."""
    with Browser(width=request.param, dark=request.param == 1000) as browser:
        browser.load(page)
        yield browser
        assert browser.console == []
        fetched = [url for url in browser.requests if not url.startswith("data:")]
        assert fetched == [page.absolute().as_uri()]
        width = browser.run("document.documentElement.scrollWidth")
        assert width <= request.param


def count(browser, selector):
    return browser.run(f"document.querySelectorAll('{selector}').length")


def text(browser, selector):
    return browser.run(f"document.querySelector('{selector}').textContent")


def test_the_page_shows_what_was_found(browser):
    assert text(browser, "#verdict").startswith("3 of 9 sections stand out: z 3 is bl")
    assert text(browser, "#place-1 h3") == "1off by 5.0 px"
    first = text(browser, "#place-1 code").split(", ")
    assert int(first[2]) in (MOVED, MOVED + 1)
    assert count(browser, ".place") == 12
    assert count(browser, "#curves svg") == 4
    # Correlation, jump and jitter: each with its median, its 95 % and before.
    assert count(browser, "#curves polyline.before") == 3
    assert count(browser, "#curves .blank") == 4
    assert count(browser, ".map img") == 2 and count(browser, ".cut img") == 2
    assert count(browser, "#out tbody tr") == 3
    moved = text(browser, "#out tbody tr:nth-child(2)")
    assert moved.startswith("6jumps by 5.0 px from z 5; matched nothing when sect")
    # All pictures can be decoded.
    sizes = (
        "[...document.images].every((image) => image.complete && image.naturalWidth)"
    )
    assert browser.run(sizes)


def test_a_section_is_at_least_three_pixels_high(browser):
    for picture in (".cut img", ".map img"):
        height = browser.run(f"document.querySelector('{picture}').clientHeight")
        assert height >= 3 * NUM


def test_a_click_shows_one_section_then_the_other(browser):
    crop = "document.querySelector('#place-1 .crop')"
    shown = []
    for _ in range(4):
        shown.append(browser.run(f"{crop}.dataset.shows"))
        browser.run(f"{crop}.click()")
    assert shown == ["both", "section", "reference", "both"]


def test_the_pointer_reads_a_section(browser):
    at = "document.querySelector('#curves').getBoundingClientRect()"
    left, top, width = browser.run(f"[{at}.left, {at}.top, {at}.width]")
    browser.run("document.querySelector('#curves').scrollIntoView()")
    left, top, width = browser.run(f"[{at}.left, {at}.top, {at}.width]")
    x = left + 46 + (width - 54) * (MOVED + 0.5) / NUM
    browser.mouse("mouseMoved", x, top + 60)
    browser.wait("document.querySelector('#readout').textContent")
    assert text(browser, "#readout").startswith("z 6 on 5: correlation of neighbours")
    x = left + 46 + (width - 54) * (BLANK + 0.5) / NUM
    browser.mouse("mouseMoved", x, top + 60)
    browser.wait("document.querySelector('#readout').textContent === 'z 3: blank'")


def test_arrow_keys_read_one_section_after_the_other(browser):
    browser.run("document.querySelector('#curves').focus()")
    read = []
    for key in ("End", "ArrowLeft", "Home", "ArrowLeft", "ArrowRight"):
        browser.press(key)
        read.append(text(browser, "#readout")[:4])
    # At an end the section stays.
    assert read == [f"z {NUM - 1} ", f"z {NUM - 2} ", "z 0:", "z 0:", "z 1 "]
    at = "document.querySelector('#curves .cursor').getAttribute('x1')"
    before = browser.run(at)
    # Curves are drawn again when the window changes; the section stays.
    browser.run("dispatchEvent(new Event('resize'))")
    assert browser.run(at) == before
    assert text(browser, "#readout").startswith("z 1 on 0")


def test_a_number_on_a_map_leads_to_its_place(browser):
    browser.run("document.querySelector('.marker').focus()")
    browser.press("Enter")
    browser.wait("document.querySelector('#place-1:target')")
    top = "document.querySelector('#place-1').getBoundingClientRect().top"
    browser.wait(f"Math.abs({top}) < innerHeight")


def test_every_figure_is_explained(browser):
    assert browser.run("document.querySelector('#meaning').open") is False
    browser.run("document.querySelector('#meaning summary').click()")
    terms = browser.run(
        "[...document.querySelectorAll('#meaning dt')].map((one) => one.textContent)"
    )
    assert len(terms) == len(set(terms))
    labels = browser.run(
        "[...document.querySelectorAll('.tile span')].map((one) => one.textContent)"
    )
    assert len(labels) == 8
    for label in labels:
        assert any(term in label for term in terms), label
    assert "off by" in terms


def test_axes_have_round_figures_and_equal_steps(browser):
    labels = browser.run(
        "[...document.querySelectorAll('#curves svg:last-child text')]"
        ".map((one) => [one.textContent, Number(one.getAttribute('x'))])"
    )
    assert labels[0][0] == "Folded pixels, %"
    # There are no folds.
    assert [words for words, _ in labels[1:4]] == ["0", "0.5", "1"]
    at = [x for words, x in labels if words.startswith("z ")]
    assert len(at) >= 4 and np.ptp(np.diff(at)) < 0.01
    assert browser.run("[shown(-0.04, 1), shown(-0.06, 1)]") == ["0.0", "-0.1"]
