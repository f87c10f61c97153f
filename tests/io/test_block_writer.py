"""Volumes that several processes write, block by block."""

import json
import os
import time

import numpy as np
import pytest

from metroem.errors import DatasetError, UsageError
from metroem.geometry.grid import Grid
from metroem.io.volume import Volume
from metroem.io.volume_write import BlockWriter, NewVolume, SectionWriter

AREA = Grid(0, 64, -128, 320, 192)
NOTES = {"kind": "fields", "channel_order": "yx", "field_unit": "relative"}


def wanted(area=AREA, sections=range(3, 7), mip=2):
    return NewVolume(2, "float32", mip, area, sections, (8.0, 8.0, 40.0), NOTES)


def open_writer(folder, new=None, **how):
    options = {"block_px": 32, "chunk_size": (16, 32, 2), **how}
    return BlockWriter(str(folder), new or wanted(), flag="--dst_path", **options)


def info_of(folder):
    return json.loads((folder / "info").read_text())


def test_fields_are_laid_out_as_those_that_are_exported(tmp_path):
    """So that corgie and download_field.py read both in the same way."""
    open_writer(tmp_path / "blocks")
    SectionWriter(str(tmp_path / "sections"), wanted(), flag="--dst_path")

    ours, exported = info_of(tmp_path / "blocks"), info_of(tmp_path / "sections")
    for info in (ours, exported):
        for scale in info["scales"]:
            del scale["chunk_sizes"]
    assert ours == exported


def test_blocks_are_read_as_they_were_written(tmp_path):
    writer = open_writer(tmp_path)
    field = np.random.default_rng(0).normal(size=(4, 2, 80, 48)).astype(np.float32)

    for z in (0, 2):
        for row in range(0, 80, 32):
            for col in range(0, 48, 32):
                grid = AREA.at_mip(2).crop(
                    row, col, min(32, 80 - row), min(32, 48 - col)
                )
                part = field[z : z + 2, :, row : row + 32, col : col + 32]
                writer.write(part, grid, range(z + 3, z + 5))

    stored = Volume(str(tmp_path)).read(AREA.at_mip(2), range(3, 7))
    np.testing.assert_array_equal(stored, field)
    assert not list(tmp_path.glob(".writing-*"))
    names = {path.name for path in (tmp_path / "32_32_40").iterdir()}
    assert len(names) == 5 * 2 * 2 and "16-32_-32-0_3-5" in names


def test_a_block_that_does_not_consist_of_whole_chunks_is_refused(tmp_path):
    writer = open_writer(tmp_path)
    grid = AREA.at_mip(2).crop(8, 0, 16, 32)

    with pytest.raises(DatasetError):
        writer.write(np.ones((2, 2, 16, 32), np.float32), grid, range(3, 5))

    assert not (tmp_path / "32_32_40").exists()


def test_bounds_grow_and_never_shrink(tmp_path):
    open_writer(tmp_path)
    # At mip 2: 16 px more in front along x; 40 px more behind along y; later sections.
    wide = Grid(0, 0, -128, 384, 352)
    open_writer(tmp_path, wanted(wide, range(3, 10)))
    grown = info_of(tmp_path)
    assert Volume(str(tmp_path)).extent() == (wide, range(3, 10))

    open_writer(tmp_path)

    assert info_of(tmp_path) == grown


@pytest.mark.parametrize(
    ("area", "sections"),
    [
        (Grid(0, 32, -128, 352, 192), range(3, 7)),  # 8 px of mip 2: half a chunk
        (AREA, range(2, 7)),
    ],
)
def test_chunks_that_would_get_other_names_are_refused(tmp_path, area, sections):
    open_writer(tmp_path)
    before = info_of(tmp_path)

    with pytest.raises(DatasetError, match="not whole chunks"):
        open_writer(tmp_path, wanted(area, sections))

    assert info_of(tmp_path) == before


def test_a_volume_of_another_kind_is_refused_with_what_differs(tmp_path):
    open_writer(tmp_path)

    with pytest.raises(DatasetError, match=r"already exists, with chunk_sizes of mip"):
        open_writer(tmp_path, chunk_size=(16, 16, 2))


def test_an_encoding_that_cannot_hold_the_type_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--encoding png: holds uint8"):
        open_writer(tmp_path / "v", encoding="png")

    assert not (tmp_path / "v").exists()


def test_what_killed_runs_left_is_deleted_but_not_what_others_write(tmp_path):
    old, new = tmp_path / ".writing-old", tmp_path / ".writing-new"
    for folder in (old, new):
        folder.mkdir()
    two_days_ago = time.time() - 48 * 3600
    os.utime(old, (two_days_ago, two_days_ago))

    open_writer(tmp_path)

    assert not old.exists() and new.exists()


def test_the_provenance_is_written_once(tmp_path):
    writer = open_writer(tmp_path)
    for _ in range(2):
        writer.describe(["file:///raw"], {"by": "metroem"})

    made = json.loads((tmp_path / "provenance").read_text())
    assert made["sources"] == ["file:///raw"]
    assert made["processing"] == [{"by": "metroem"}]
