import numpy as np
import pytest

from metroem.errors import DatasetError
from metroem.prepare.pair_files import is_done, open_parts, report_blank


def test_a_file_that_cannot_be_read_is_kept_unless_overwritten(tmp_path):
    path = tmp_path / "x0_y0_z0_MIP0.h5"
    path.write_bytes(b"nonsense")
    with pytest.raises(DatasetError, match="--overwrite"):
        is_done(path, {}, overwrite=False)
    assert not is_done(path, {}, overwrite=True)


def test_parts_of_other_arguments_are_dropped_only_to_overwrite(tmp_path):
    path = tmp_path / "x0_y0_z0_MIP0.h5"
    open_parts(path, {"mip": 0}, overwrite=False).put("a", np.zeros(2))
    assert open_parts(path, {"mip": 0}, overwrite=True).keys() == ["a"]
    with pytest.raises(DatasetError, match="mip 0"):
        open_parts(path, {"mip": 1}, overwrite=False)
    assert open_parts(path, {"mip": 1}, overwrite=True).keys() == []


def test_sections_of_which_most_is_blank_are_named(tmp_path, caplog):
    caplog.set_level("INFO", "metroem")
    report_blank(tmp_path / "a.h5", "gs://em", {7: 0.0, 8: 0.75, 9: 1.0})
    assert "3 sections, blank 58.3% (0.0%...100.0%)" in caplog.text
    assert "sections 8 (75%), 9 (100%)" in caplog.text


def test_nothing_but_blank_is_refused_saying_what_to_check(tmp_path):
    with pytest.raises(DatasetError, match="coordinates.*mip was written.*zeros"):
        report_blank(tmp_path / "a.h5", "gs://em", {7: 1.0, 8: 1.0})
