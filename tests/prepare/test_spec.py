import copy

import pytest

from metroem.errors import UsageError
from metroem.geometry.grid import Grid
from metroem.io.field_volume import FieldFormat
from metroem.prepare.dataset_spec import AreaSpec, Center, load_spec, parse_spec

AREA = {"path": "gs://em", "src_mip": 4, "dst_mip": 3, "x_size": 512, "y_size": 256}
SPEC = {
    "image": {"path": "gs://em", "src_mip": 3, "reference": AREA},
    "field": {"path": "gs://field", "src_mip": 5, "reference": AREA},
    "masks": [{"path": "gs://mask", "src_mip": 6, "threshold": 178}],
    "max_mip": 5,
    "dst_mip": 3,
    "x_size": 100,
    "y_size": 64,
    "pairs": [[{"x": 4096, "y": 2048, "z": 7}, {"x": 4096, "y": 2048, "z": 6}]],
}


def changed(where, value):
    """Change a value of SPEC at a path; None leaves the key out."""
    spec = copy.deepcopy(SPEC)
    *parents, key = where
    inner = spec
    for parent in parents:
        inner = inner[parent]
    if value is None:
        del inner[key]
    else:
        inner[key] = value
    return spec


def test_a_spec_of_the_original_is_read_as_it_meant_it():
    spec = parse_spec(SPEC, "spec")
    assert spec.image.reference == AreaSpec(**AREA)
    assert spec.field is not None
    # make_dataset took y from channel 0, in mip-0 pixels.
    assert spec.field.form == FieldFormat("yx", "mip0")
    assert spec.masks[0].threshold == 178
    assert spec.pairs == ((Center(4096, 2048, 7), Center(4096, 2048, 6)),)


def test_patches_are_centred_on_the_grid_of_max_mip():
    spec = parse_spec(SPEC, "spec")
    # 100 px of mip 3 are 800: 4096 - 400 = 3696, down to a multiple of 32: 3680.
    assert spec.patch(Center(4096, 2048, 7)) == Grid(3, 3680, 2048 - 256, 100, 64)


def test_without_a_reference_the_patch_is_profiled_and_the_image_kept_as_stored():
    tree = changed(["field", "reference"], None)
    del tree["image"]["reference"]
    spec = parse_spec(tree, "spec")
    assert spec.image.reference is None
    assert spec.field is not None
    assert spec.field.reference == AreaSpec("gs://field", 5, 3, 100, 64)


def test_other_pairs_are_another_request():
    a = parse_spec(SPEC, "spec").as_request()
    b = parse_spec(changed(["pairs", 0, 1, "z"], 5), "spec").as_request()
    assert a["num_pairs"] == b["num_pairs"] == 1
    assert {key for key in a if a[key] != b[key]} == {"pairs_sha256"}


@pytest.mark.parametrize(
    ("where", "value", "match"),
    [
        (["image"], None, "image is missing"),
        (["image", "mip"], 3, r"image: unknown key \['mip'\]"),
        (["image", "path"], 3, "path is 3: expected a path"),
        (["image", "src_mip"], 4, "image: src_mip 4: expected at most the dst_mip 3"),
        (["image", "reference", "x_size"], 0, "reference: x_size is 0.*>= 1"),
        (["field", "src_mip"], 2, "field: src_mip 2: expected at least"),
        (["field", "reference", "dst_mip"], 2, "reference: dst_mip 2: expected at"),
        (
            ["field", "channel_order"],
            "zx",
            "field: channel_order is 'zx': expected one of .*'xy'",
        ),
        (
            ["field", "field_unit"],
            "px",
            "field: field_unit is 'px': expected one of .*'mip0'",
        ),
        (["field", "int16_scale"], -1, "field: int16_scale -1: must be > 0"),
        (["field", "int16_scale"], "1", "field: int16_scale is '1': expected a number"),
        (["masks"], {}, "expected a list"),
        (["masks", 0, "threshold"], "high", "masks 0: threshold is 'high'"),
        (["masks", 0, "threshold"], None, "masks 0: threshold is missing"),
        (["max_mip"], 2, "max_mip 2: expected the coarsest"),
        (["dst_mip"], -1, "dst_mip is -1: expected a whole number >= 0"),
        (["x_size"], 9.5, "x_size is 9.5: expected a whole number"),
        (["pairs", 0], [], r"pairs 0: expected src and tgt, got \[\]"),
        (["pairs", 0, 1, "z"], 7, "pairs 0: src and tgt are the same section, 7"),
        (["pairs", 0, 0, "z"], None, "pairs 0 0: z is missing"),
    ],
)
def test_a_spec_that_cannot_work_is_refused_saying_where(where, value, match):
    with pytest.raises(UsageError, match=match):
        parse_spec(changed(where, value), "spec")


def test_a_spec_without_pairs_makes_no_data_set(tmp_path):
    (tmp_path / "s.json").write_text(
        '{"image": {"path": "a", "src_mip": 0}, '
        '"max_mip": 0, "dst_mip": 0, "x_size": 8, '
        '"y_size": 9}'
    )
    with pytest.raises(UsageError, match="no pairs; add some"):
        load_spec(tmp_path / "s.json")
