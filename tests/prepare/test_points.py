import argparse
import dataclasses
import json

import pytest

from metroem.__main__ import build_parser, main
from metroem.errors import UsageError
from metroem.prepare.create_spec import read_points
from metroem.prepare.requests import SpecRequest

TEMPLATE = {
    "image": {"path": "gs://em", "src_mip": 2},
    "masks": [],
    "max_mip": 5,
    "dst_mip": 2,
    "x_size": 96,
    "y_size": 64,
    "pairs": [],
}
HEADER = (
    "Coordinate 1,Coordinate 2,Ellipsoid Dimensions,Tags,Description,"
    "Segment IDs,Parent ID,Type,ID\n"
)


def exported(*points, kind="Point"):
    return HEADER + "".join(f'"{point}",,,,,,,{kind},a1\n' for point in points)


@pytest.fixture
def create(tmp_path):
    (tmp_path / "template.json").write_text(json.dumps(TEMPLATE))

    def run(table, *flags):
        (tmp_path / "points.csv").write_text(table)
        paths = ["--src_spec_path", str(tmp_path / "template.json")]
        paths += ["--points_path", str(tmp_path / "points.csv")]
        paths += ["--dst_spec_path", str(tmp_path / "made" / "spec.json")]
        main(["create-spec", *paths, *map(str, flags)])
        return json.loads((tmp_path / "made" / "spec.json").read_text())

    return run


def place(x, y, z):
    return {"x": x, "y": y, "z": z}


def test_each_flag_is_a_field_of_the_request():
    commands = next(
        action
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    dests = {action.dest for action in commands.choices["create-spec"]._actions}
    assert dests - {"help"} == {f.name for f in dataclasses.fields(SpecRequest)}


def test_points_become_pairs_at_every_distance_on_the_grid_of_max_mip(create):
    spec = create(exported("(100, 64, 17)", "(-1, 40.7, 9)"), "--offsets", -1, 3, -2)
    # Rounded down to multiples of 32.
    assert spec["pairs"] == [
        [place(96, 64, 17), place(96, 64, 16)],
        [place(96, 64, 17), place(96, 64, 20)],
        [place(96, 64, 17), place(96, 64, 15)],
        [place(-32, 32, 9), place(-32, 32, 8)],
        [place(-32, 32, 9), place(-32, 32, 12)],
        [place(-32, 32, 9), place(-32, 32, 7)],
    ]
    assert {key: spec[key] for key in TEMPLATE if key != "pairs"} == {
        key: value for key, value in TEMPLATE.items() if key != "pairs"
    }


def test_plain_columns_are_taken_too(create):
    spec = create("name,z0,x0,y0\na,17,100,64\n")
    assert spec["pairs"] == [[place(96, 64, 17), place(96, 64, 16)]]


def test_a_table_that_a_spreadsheet_saved_is_read(tmp_path):
    (tmp_path / "p.csv").write_text("\ufeffx0,y0,z0\r\n1,2,3\r\n", encoding="utf-8")
    assert read_points(tmp_path / "p.csv") == [(1, 2, 3)]


def test_points_on_one_pixel_of_max_mip_make_one_pair(create, caplog):
    caplog.set_level("INFO", "metroem")
    spec = create(exported("(100, 64, 17)", "(101, 65, 17)"))
    assert len(spec["pairs"]) == 1
    assert "2 points, 1 pairs in all, 1 left out" in caplog.text


def test_annotations_that_are_no_points_are_named(create, caplog):
    create(exported("(100, 64, 17)", kind="Line"))
    assert "1 annotations are not points; their Coordinate 1" in caplog.text


def test_another_spec_is_replaced_only_to_overwrite(create):
    create(exported("(100, 64, 17)"))
    create(exported("(100, 64, 17)"))
    with pytest.raises(UsageError, match="--overwrite"):
        create(exported("(100, 64, 18)"))
    assert create(exported("(100, 64, 18)"), "--overwrite")["pairs"][0][0]["z"] == 18


@pytest.mark.parametrize(
    ("table", "flags", "match"),
    [
        (exported("(100, 64, 17)"), ["--offsets", 0, -1], "other than 0"),
        (exported(), [], "has no points"),
        ("x,y,z\n1,2,3\n", [], "'Coordinate 1'.*x0, y0, z0, got"),
        (exported("(100, 64)"), [], r"line 2: expected a point.*got '\(100, 64\)'"),
        ("x0,y0,z0\n1,2,3\n1,,3\n", [], "line 3: expected a point"),
        (exported("(100, 64, nan)"), [], "line 2: expected a point"),
    ],
)
def test_what_has_no_points_is_refused(create, table, flags, match):
    with pytest.raises(UsageError, match=match):
        create(table, *flags)


def test_a_template_or_table_that_is_not_there_is_refused(tmp_path, create):
    with pytest.raises(UsageError, match="--points_path .*no such file"):
        read_points(tmp_path / "none.csv")
    (tmp_path / "template.json").write_text("{")
    with pytest.raises(UsageError, match="--src_spec_path .*not JSON"):
        create(exported("(100, 64, 17)"))
    (tmp_path / "template.json").unlink()
    with pytest.raises(UsageError, match="--src_spec_path .*no such file"):
        create(exported("(100, 64, 17)"))
