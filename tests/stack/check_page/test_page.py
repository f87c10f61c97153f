import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from metroem.stack.check_page.pictures import draw_map, even_sections
from tests.evaluation.report.pages import HOSTILE, Scripts, blocks
from tests.stack.checks import run_check
from tests.stack.textures import waves, write_sections

ROWS, COLS, NUM = 300, 420, 4


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    """A volume whose third section is moved by 4 px along x."""
    sections = [waves(ROWS, COLS, (4.0 * (z == 2), 0)) for z in range(NUM)]
    folder = tmp_path_factory.mktemp("page")
    return write_sections(folder / "image", sections, mips=2, offset=(64, 128, 7))


@pytest.fixture(scope="module")
def page(volume, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    run_check(volume, folder)
    return folder / "report.html"


def decoded(uri):
    content = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(content)))


def test_the_page_holds_the_figures_and_asks_no_network(page):
    figures = blocks(page)["figures"]
    stored = json.loads(page.with_name("check.json").read_text())
    assert figures["sections"] == stored["sections"]
    text = page.read_text()
    for tag, attributes in Scripts(text).tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert not {"src", "href", "srcset", "style"} & set(attributes), tag
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert "unsafe" not in policy and "http" not in policy


def test_pictures_show_the_place_upright(page):
    place = blocks(page)["figures"]["worst"][0]
    section, reference = decoded(place["section"]), decoded(place["reference"])
    # All of x, which has 300 px, and 320 of 420 px of y: x runs to the right.
    assert section.shape == reference.shape == (320, 300)
    assert (place["width"], place["height"]) == (300, 320)
    # Section 9 lies 4 px further along x than its neighbours.
    shift = 4 if place["z"] == 9 else -4
    inner = slice(20, -20)
    moved = np.roll(section, -shift, 1)[inner, inner].astype(float)
    assert np.abs(moved - reference[inner, inner]).mean() < 3
    assert (
        np.abs(section[inner, inner].astype(float) - reference[inner, inner]).mean() > 9
    )
    # The cut runs along x, in which the two are displaced.
    assert place["cut_axis"] == "x" and place["cut_z"] == [7, 11]
    cut = decoded(place["cut"]).astype(float)
    assert cut.shape == (4, 300)
    assert np.abs(cut[1, :-20] - cut[2, 4:-16]).mean() < 3


def test_cuts_go_through_the_middle(page):
    along_y, along_x = blocks(page)["figures"]["cuts"]
    assert (along_y["axis"], along_y["at"]) == ("y", 64 + 149)
    assert (along_y["start"], along_y["end"]) == (128, 128 + COLS)
    assert decoded(along_y["picture"]).shape == (NUM, COLS)
    assert (along_x["axis"], along_x["at"]) == ("x", 128 + 209)
    assert decoded(along_x["picture"]).shape == (NUM, ROWS)
    expected = waves(ROWS, COLS)[:, 209]
    found = decoded(along_x["picture"])[0]
    assert np.corrcoef(expected, found)[0, 1] > 0.99


def test_sections_of_a_cut_are_equally_bright():
    greys = 128 + waves(1, 200)
    cut = np.concatenate([greys, 40 + 0.3 * greys, 0 * greys])
    cut[:, 150:] = 0
    evened = even_sections(cut)
    np.testing.assert_allclose(evened[0], evened[1], atol=1e-3)
    assert evened[0, :150].std() == pytest.approx(40, rel=0.05)
    assert evened[:2, :150].min() >= 1
    assert not evened[2].any() and not evened[:, 150:].any()
    # One grey level is tissue, too.
    assert even_sections(np.full((1, 9), 7, np.uint8)).tolist() == [[128.0] * 9]


def test_large_volumes_are_cut_at_a_coarser_mip(volume, tmp_path, monkeypatch):
    monkeypatch.setattr("metroem.stack.check_page.pictures._CUT_PX", 250)
    monkeypatch.setattr("metroem.stack.check_page.pictures._MAX_SECTIONS", 2)
    run_check(volume, tmp_path)
    along_y, along_x = blocks(tmp_path / "report.html")["figures"]["cuts"]
    assert along_y["step"] == 2
    assert decoded(along_y["picture"]).shape == (NUM // 2, COLS // 2)
    assert decoded(along_x["picture"]).shape == (NUM // 2, ROWS // 2)
    # The whole is still shown.
    assert (along_y["start"], along_y["end"]) == (128, 128 + COLS)


def test_maps_have_a_row_a_section_and_a_column_a_cell(page):
    figures = blocks(page)["figures"]
    assert figures["num_cells"] == [2, 2]
    error, correlation = figures["maps"]
    assert decoded(error["picture"]).shape == (NUM, 4, 4)
    # The first section is compared with nothing: transparent.
    assert (decoded(error["picture"])[0, :, 3] == 0).all()
    # The right cells are 164 px wide, the lower ones 44 px high: too few to measure.
    assert decoded(correlation["picture"])[1, :, 3].tolist() == [255, 255, 0, 0]
    brightness = decoded(error["picture"])[..., :3].astype(int).sum(-1)
    assert brightness[2, 0] > brightness[1, 0]


def test_colours_rise_in_brightness_with_the_value():
    picture = decoded(draw_map(np.linspace(0, 2, 9)[None], 0.0, 2.0))
    luminance = picture[0, :, :3] @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(luminance) > 0).all()


def test_names_cannot_leave_their_block(volume, tmp_path):
    folder = tmp_path / HOSTILE.replace("/", "")
    folder.mkdir()
    path = write_sections(folder / "image", [waves(150, 200) for _ in range(2)])
    run_check(path, tmp_path / "out")
    found = Scripts((tmp_path / "out" / "report.html").read_text())
    assert [dict(a).get("type") for a, _ in found.scripts] == ["application/json", None]
    assert blocks(tmp_path / "out" / "report.html")["figures"]["cv_path"] == path
