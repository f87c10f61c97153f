import re

import pytest

from metroem.evaluation.report.page import neuroglancer_source, report_page
from tests.evaluation.report.pages import ABOUT, HOSTILE, Scripts, blocks, make_page


def test_each_pair_has_a_block_and_the_summary_names_them(tmp_path):
    data = blocks(make_page(tmp_path / "new" / "report.html"))
    assert list(data) == ["pair-0", "pair-1", "pair-2", "summary"]
    summary = data["summary"]
    assert [pair["where"]["pair"] for pair in summary["pairs"]] == [0, 1, 2]
    cpc = [pair["score"]["cpc"] for pair in summary["pairs"]]
    assert cpc[0] < cpc[1] < cpc[2] and cpc[2] > 0.99
    # Two stages: half of the field, all of it.
    assert summary["pairs"][2]["stage_cpc"][1] == pytest.approx(cpc[2], abs=1e-5)
    assert summary["pairs"][0]["corner"] == [0, 0]
    assert summary["sets"][0]["source"] == "made by a test"
    assert summary["sets"][0]["neuroglancer"] is None
    # What is not known is null, which JSON has, and not NaN, which it has not.
    assert summary["about"]["curves"][0]["values"]["training"] == [3.0, None, 0.5]


def test_the_page_asks_no_network_for_anything(tmp_path):
    text = make_page(tmp_path / "report.html").read_text()
    for tag, attributes in Scripts(text).tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert not {"src", "href", "srcset"} & set(attributes), tag
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy and "http" not in policy


def test_names_and_paths_cannot_leave_their_block(tmp_path):
    about = {**ABOUT, "checkpoint_name": HOSTILE, "pyramid_path": HOSTILE}
    plain = Scripts(make_page(tmp_path / "a" / "plain.html").read_text())
    path = make_page(
        tmp_path / "b" / "report.html",
        source=HOSTILE,
        about=about,
        suffix=f"_{HOSTILE.replace('/', '')}",
    )
    found = Scripts(path.read_text())
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in plain.tags]
    summary = blocks(path)["summary"]
    assert summary["about"]["checkpoint_name"] == HOSTILE
    assert summary["sets"][0]["source"] == HOSTILE
    assert summary["sets"][0]["neuroglancer"] is None


def test_a_page_that_fails_leaves_nothing_and_the_old_one_as_it_was(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(RuntimeError), report_page(path):
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("gs://bucket/em", "precomputed://gs://bucket/em"),
        ("precomputed://https://host/em", "precomputed://https://host/em"),
        ("zarr3://s3://bucket/em", "zarr3://s3://bucket/em"),
        ("file:///data/em", None),
        ("javascript://https://host", None),
        ("", None),
    ],
)
def test_neuroglancer_is_offered_what_it_can_open(path, source):
    assert neuroglancer_source(path) == source
