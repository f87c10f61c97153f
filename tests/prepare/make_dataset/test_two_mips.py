"""Check that the same pairs at two mips are moved alike and fit the stages."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from metroem.data.dataset import PairRef, find_pairs, read_sample
from metroem.errors import DatasetError
from metroem.io.h5 import FieldSet, ImageSet
from metroem.models.options import AlignerOptions
from metroem.models.types import Alignment
from metroem.prepare.inspect import inspect_dataset
from metroem.prepare.requests import InspectRequest
from metroem.specs.modules import ModuleSpec
from metroem.training import write_fields as writing
from tests.prepare.make_dataset.conftest import (
    COLS,
    PAIRS,
    ROWS,
    with_field,
    with_reference,
)

NAME = "x144_y32_z12_MIP{}"


def at_mip_1(spec):
    return spec | {"dst_mip": 1, "x_size": ROWS // 2, "y_size": COLS // 2}


@pytest.fixture
def both(tmp_path, make, spec, volume):
    """Make images and fields at mips 1 and 0; residual fields are below a pixel."""
    spec = with_field(with_reference(spec, volume), tmp_path)
    make(spec)
    make(at_mip_1(spec))
    return tmp_path / "data"


def test_both_mips_are_moved_alike(both):
    fine, coarse = (ImageSet(both / f"{NAME.format(mip)}.h5") for mip in (0, 1))
    for index in range(len(PAIRS)):
        for side in (0, 1):
            assert fine.offset(index, side) == coarse.offset(index, side)
    inspect_dataset(InspectRequest(both))


def test_a_stage_at_the_finer_mip_sees_tgt_where_the_one_before_did(both, monkeypatch):
    class Keeps:
        options = AlignerOptions()

        def align_pair(self, src, tgt, prior, *, options, defects):
            return Alignment(prior, None)

    monkeypatch.setattr(writing, "_load", lambda *job: Keeps())
    one = ModuleSpec(1, 1, "n", both / "1_mip1in_n")
    (one.path / "model").mkdir(parents=True)
    (one.path / "model" / "precomputed.state.pth.tar").touch()
    device = torch.device("cpu")
    job = writing.WriteFieldsConfig(one, 0, both, both, "precomputed", device)
    writing.write_fields(job, SimpleNamespace(code=0))  # type: ignore[arg-type]

    for ref in find_pairs(both, 0, stage=2, checkpoint_name="precomputed"):
        sample = read_sample(ref, ref.grid)
        # The field set of make-dataset at this mip places both sides as well.
        given = FieldSet(both / f"field_0_{NAME.format(0)}_precomputed.h5")
        expected = read_sample(PairRef(ref.images, given, ref.index), ref.grid)
        inner = (..., slice(4, -4), slice(4, -4))
        for name in ("src", "tgt", "prior_field"):
            torch.testing.assert_close(
                *(getattr(one, name)[inner] for one in (sample, expected)),
                atol=0.05,
                rtol=0,
            )


def test_mips_of_which_each_has_a_reference_of_its_own_are_refused(
    tmp_path, make, spec, volume
):
    spec = with_field(with_reference(spec, volume), tmp_path)
    make(spec)
    area = {"path": spec["field"]["path"], "src_mip": 1, "dst_mip": 3}
    spec["field"]["reference"] = area | {"x_size": 4, "y_size": 4}
    make(at_mip_1(spec) | {"max_mip": 3})
    sets = [ImageSet(tmp_path / "data" / f"{NAME.format(1)}.h5")]
    match = r"src of pair 0 was moved by .*make both mips with make-dataset"
    with pytest.raises(DatasetError, match=match):
        writing.target_sets(tmp_path / "data", sets, 0)
    assert np.any([sets[0].offset(0, side) for side in (0, 1)])
