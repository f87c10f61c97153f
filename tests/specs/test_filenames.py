import pytest

from metroem.errors import UsageError
from metroem.specs.filenames import (
    FieldSetName,
    ImageSetName,
    check_checkpoint_name,
    check_tag,
)


@pytest.mark.parametrize(
    "name",
    [
        ImageSetName(0, 0, 0, 0),
        ImageSetName(200960, 136448, 8175, 5),
        ImageSetName(-16, 7, -3, 12, "second_try"),
        ImageSetName(1, 2, 3, 10, "x1_y2_z3"),
    ],
)
def test_an_image_set_name_reads_back_as_it_was_written(name):
    assert ImageSetName.parse(name.filename) == name


def test_the_name_is_that_of_the_original():
    assert ImageSetName(1, 2, 3, 5).filename == "x1_y2_z3_MIP5.h5"
    assert ImageSetName(1, 2, 3, 5, "foo").filename == "x1_y2_z3_MIP5_foo.h5"
    field = FieldSetName(0, "x1_y2_z3", 5, "checkpoint")
    assert field.filename == "field_0_x1_y2_z3_MIP5_checkpoint.h5"


def test_a_suffix_before_the_mip_is_read_as_well():
    name = ImageSetName(1, 2, 3, 5, "foo_bar")
    assert ImageSetName.parse("x1_y2_z3_foo_bar_MIP5.h5") == name


def test_all_mips_of_a_place_share_its_name():
    places = {ImageSetName(1, 2, 3, mip, "foo").place for mip in (0, 5, 12)}
    assert places == {"x1_y2_z3_foo"}


@pytest.mark.parametrize(
    "name",
    [
        FieldSetName(0, "x1_y2_z3", 5, "checkpoint"),
        FieldSetName(12, "x-1_y2_z3_foo_bar", 10, "a_b_c"),
        FieldSetName(0, "x1_y2_z3", 0),
    ],
)
def test_a_field_set_name_reads_back_as_it_was_written(name):
    assert FieldSetName.parse(name.filename) == name


@pytest.mark.parametrize(
    "filename",
    [
        "x1_y2_z3_MIP5.h5.tmp",
        ".x1_y2_z3_MIP5.h5",
        "old_x1_y2_z3_MIP5.h5",
        "x1_y2_MIP5.h5",
        "x1_y2_z3_MIPa.h5",
        "x1_y2_z3_foo_MIP5_bar.h5",
        "x1_y2_z3_MIP5_MIP3.h5",
        "x1_y2_z3_MIP5_a\nb.h5",
        "field_0_x1_y2_z3_MIP5_checkpoint.h5",
    ],
)
def test_other_names_are_no_image_sets(filename):
    assert ImageSetName.parse(filename) is None


@pytest.mark.parametrize(
    "filename", ["x1_y2_z3_MIP5.h5", "field_a_x1_y2_z3_MIP5.h5", "field_0_MIP5.h5"]
)
def test_other_names_are_no_field_sets(filename):
    assert FieldSetName.parse(filename) is None


@pytest.mark.parametrize("value", ["", "a/b", "MIP5", "a_MIP12", "a_MIP3_b", "a\nb"])
def test_a_suffix_that_would_not_read_back_is_refused(value):
    with pytest.raises(UsageError, match="--suffix"):
        check_tag("--suffix", value)
    with pytest.raises(UsageError):
        ImageSetName(1, 2, 3, 5, value)


@pytest.mark.parametrize("value", ["a", "MIP", "aMIP5", "v1.2-b", "été"])
def test_an_ordinary_suffix_is_taken(value):
    check_tag("--suffix", value)


def test_a_checkpoint_name_that_is_too_long_for_a_file_is_refused():
    check_checkpoint_name("ä" * 50)
    with pytest.raises(UsageError, match="has 102 bytes, expected at most 100"):
        check_checkpoint_name("ä" * 51)
