"""Names, schedules, specs and tables of points that are nearly right."""

import json
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metroem.errors import UsageError
from metroem.prepare.create_spec import create_spec, read_points
from metroem.prepare.dataset_spec import load_spec
from metroem.prepare.requests import SpecRequest
from metroem.specs.filenames import FieldSetName, ImageSetName
from metroem.specs.modules import ModuleSpec, find_modules
from metroem.specs.schedule import load_schedule
from tests.bad_input.inputs import broken_text, encoded, ends_well, nearly, tried

pytestmark = pytest.mark.slow

SCHEDULES = [
    json.loads(
        (
            resources.files("metroem") / "specs" / "schedules" / f"{mode}.json"
        ).read_text()
    )
    for mode in ("scratch", "classic")
]
AREA = {"path": "gs://b/em", "src_mip": 1, "dst_mip": 1, "x_size": 256, "y_size": 192}
SPEC = {
    "image": {"path": "gs://b/em", "src_mip": 0, "reference": AREA},
    "field": {"path": "gs://b/f", "src_mip": 2, "channel_order": "xy"},
    "masks": [{"path": "gs://b/m", "src_mip": 0, "threshold": 0.5}],
    **{"max_mip": 2, "dst_mip": 0, "x_size": 192, "y_size": 128},
    "pairs": [[{"x": 8, "y": 4, "z": 1}, {"x": 8, "y": 4, "z": 0}]],
}
POINTS = (
    "Coordinate 1,Coordinate 2,Type,ID\n"
    '"(1200.5, 340, 17)",,Point,a\n'
    '"(8, 9, 10)","(1, 2, 3)",Line,b\n'
)
NAMES = [
    "x200960_y136448_z8175_MIP5.h5",
    "x1_y-2_z3_MIP12_cleft.h5",
    "field_0_x200960_y136448_z8175_MIP3_mine.h5",
    "10_mip4in_rigid",
]


@st.composite
def nearly_named(draw):
    """A name with pieces of names, digits and other characters put in."""
    name = draw(st.sampled_from(NAMES))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(name)))
        piece = draw(
            st.sampled_from(["_MIP3", "_", "x1", "/", "..", "\n", "9" * 5000, "²", "-"])
            | st.text(max_size=3)
        )
        name = name[:at] + piece + name[at + draw(st.integers(0, 3)) :]
    return name


@tried(600)
@given(nearly_named())
def test_names_are_read_back_as_they_were_or_not_at_all(name):
    for kind in (ImageSetName, FieldSetName):

        def read(kind=kind):
            found = kind.parse(name)
            if found is None:
                raise UsageError("no name of a set")
            # The suffix may stand before the mip, and numbers begin with zeros.
            assert kind.parse(found.filename) == found

        ends_well("file names", read)


@tried(200)
@given(nearly_named())
def test_module_directories_are_taken_by_their_whole_name(name):
    ends_well("file names", lambda: ModuleSpec.from_path(Path(name)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("texts")


@pytest.mark.parametrize("tree", SCHEDULES, ids=["scratch", "classic"])
@tried(300)
@given(data=st.data())
def test_schedules_that_are_nearly_right(folder, tree, data):
    text = data.draw(nearly(tree).map(encoded) | broken_text(json.dumps(tree)))
    path = folder / "schedule.json"
    path.write_bytes(text)

    ends_well("schedules", lambda: use_schedule(load_schedule("custom", path)))


def use_schedule(schedule):
    """What a training asks of it before it begins."""
    for mip in (0, 3, 40):
        for phase in schedule.for_mip(mip, max_epochs=2):
            assert phase.rate(0, 10) >= 0 and phase.num_epochs <= 2


@tried(500)
@given(nearly(SPEC).map(encoded) | broken_text(json.dumps(SPEC)))
def test_specs_that_are_nearly_right(folder, text):
    path = folder / "spec.json"
    path.write_bytes(text)

    def read():
        spec = load_spec(path)
        spec.as_request()
        for pair in spec.pairs:
            assert spec.patch(pair[0]).shape == (spec.x_size, spec.y_size)

    ends_well("specs", read)


@tried(300)
@given(broken_text(POINTS))
def test_tables_of_points_that_are_nearly_right(folder, text):
    path = folder / "points.csv"
    path.write_bytes(text)

    ends_well("tables of points", lambda: read_points(path))


@tried(80)
@given(nearly(SPEC).map(encoded) | broken_text(json.dumps(SPEC)), broken_text(POINTS))
def test_a_spec_is_written_whole_or_not_at_all(folder, template, points):
    (folder / "template.json").write_bytes(template)
    (folder / "table.csv").write_bytes(points)
    (folder / "made.json").write_text("before")
    request = SpecRequest(
        *(folder / name for name in ("template.json", "table.csv", "made.json")),
        offsets=[-1],
        overwrite=True,
    )

    if ends_well("specs", lambda: create_spec(request)) == "refused":
        assert (folder / "made.json").read_text() == "before"
    else:
        load_spec(folder / "made.json")


@tried(80)
@given(st.lists(nearly_named(), max_size=3, unique=True))
def test_pyramids_of_any_folders(tmp_path_factory, names):
    pyramid = tmp_path_factory.mktemp("pyramid")
    for name in names:
        try:
            (pyramid / name).mkdir()
        except (OSError, ValueError):
            continue  # a name that the file system does not take

    ends_well("pyramids", lambda: find_modules(pyramid))
