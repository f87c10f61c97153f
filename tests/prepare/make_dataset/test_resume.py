"""Kill and repeat make-dataset, change its spec, and count what it reads."""

import hashlib
import itertools
import json

import h5py
import numpy as np
import pytest
from cloudvolume import CloudVolume

from metroem.errors import DatasetError
from metroem.io import resume
from metroem.io.h5 import FieldSet, ImageSet
from metroem.io.volume_write import SectionWriter
from metroem.prepare.pair_volumes import PairVolumes
from tests.prepare.make_dataset.conftest import (
    COLS,
    NUM_CUTOUTS,
    OFFSET,
    PAIRS,
    ROWS,
    SHAPE,
    with_field,
    with_mask,
    with_reference,
)
from tests.volumes import ReadCount, make_volume


class _Killed(BaseException):
    """Stands for a kill between two patches."""


def kill_at(patched, owner, name, count):
    countdown = itertools.count()
    original = getattr(owner, name)

    def stop(self, *args):
        if next(countdown) == count:
            raise _Killed
        return original(self, *args)

    patched.setattr(owner, name, stop)


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def whole_spec(spec, tmp_path, volume):
    return with_mask(with_field(with_reference(spec, volume), tmp_path), tmp_path)


@pytest.mark.parametrize("count", [0, 1, 3, NUM_CUTOUTS - 1])
def test_killed_anywhere_it_ends_with_the_same_bytes(
    tmp_path, make, spec, volume, monkeypatch, count
):
    spec = whole_spec(spec, tmp_path, volume)
    make(spec, dst="twin")
    with monkeypatch.context() as patched:
        kill_at(patched, resume.ResumeStore, "put", count)
        with pytest.raises(_Killed):
            make(spec)
    make(spec, "--parallel", 2)
    assert digests(tmp_path / "data") == digests(tmp_path / "twin")
    assert len(digests(tmp_path / "data")) == 2


def test_what_is_finished_is_not_read_again_and_another_spec_needs_overwrite(
    tmp_path, make, spec, monkeypatch
):
    make(spec)
    count = ReadCount(monkeypatch)
    make(spec)
    assert not count.times
    spec["pairs"].pop()
    with pytest.raises(DatasetError, match=r"num_pairs 3 \(asked for: 2\).*--overwr"):
        make(spec)
    (path,) = make(spec, "--overwrite")
    assert ImageSet(path).num_pairs == 2


def test_each_chunk_is_read_once_where_pairs_share_sections_in_thick_chunks(
    tmp_path, make, spec, sections, volume, monkeypatch
):
    spec["pairs"] = spec["pairs"][:2]
    thick = make_volume(
        tmp_path / "thick", [sections], offset=OFFSET, chunk=(32, 32, 3)
    )
    spec["image"]["path"] = thick
    count = ReadCount(monkeypatch)
    make(with_reference(spec, thick))
    assert set(count.times.values()) == {1}


def read_volume(path, mip=0):
    volume = CloudVolume(path, mip=mip, progress=False, fill_missing=False)
    return np.asarray(volume[:, :, :]).transpose(2, 3, 0, 1)


def test_a_path_with_a_scheme_gets_one_section_a_side(tmp_path, make, spec, volume):
    spec = whole_spec(spec, tmp_path, volume)
    fields_path, images_path = make(spec)
    fields, images = FieldSet(fields_path), ImageSet(images_path)
    dst = f"file://{tmp_path}/volumes"
    make(spec, dst=dst)
    found = read_volume(f"{dst}/image")
    vectors = read_volume(f"{dst}/field")
    assert found.shape == (6, 1, ROWS, COLS)
    for z in range(6):
        index, side = divmod(z, 2)
        np.testing.assert_array_equal(found[z, 0], images.read(index)[side])
        np.testing.assert_allclose(vectors[z], fields.read(index, side), atol=0.01)
        note = json.loads((tmp_path / "volumes" / "sides" / f"{z}.json").read_text())
        assert (note["pair"], note["side"]) == (index, ("src", "tgt")[side])
        assert note["center"] == list(PAIRS[index][side])
        assert note["box"] == list(images.box(index, side))


@pytest.mark.parametrize("count", [0, 2, 7])
def test_volumes_killed_anywhere_end_with_the_same_bytes(
    tmp_path, make, spec, volume, monkeypatch, count
):
    spec = whole_spec(spec, tmp_path, volume)
    make(spec, dst=f"file://{tmp_path}/twin")
    dst = f"file://{tmp_path}/volumes"
    with monkeypatch.context() as patched:
        kill_at(patched, SectionWriter, "put", count)
        with pytest.raises(_Killed):
            make(spec, dst=dst)
    # A note that was cut short says nothing.
    for note in list((tmp_path / "volumes").glob("sides/*.json"))[:1]:
        note.write_bytes(note.read_bytes()[:9])
    make(spec, dst=dst)
    assert digests(tmp_path / "volumes") == digests(tmp_path / "twin")
    with monkeypatch.context() as patched:
        kill_at(patched, PairVolumes, "put", 0)
        make(spec, dst=dst)


def test_volumes_of_another_spec_need_overwrite_and_others_stay(tmp_path, make, spec):
    dst = f"file://{tmp_path}/volumes"
    make(spec, dst=dst)
    spec["pairs"].pop()
    with pytest.raises(DatasetError, match="num_pairs 3.*--overwrite"):
        make(spec, dst=dst)
    make(spec, "--overwrite", dst=dst)
    assert read_volume(f"{dst}/image").shape == (4, 1, ROWS, COLS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(DatasetError, match="not a data set of"):
        make(spec, "--overwrite", dst=f"file://{tmp_path}/mine")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_nothing_but_blank_is_refused_and_read_again(tmp_path, make, spec, scheme):
    spec["image"]["path"] = make_volume(
        tmp_path / "unwritten", [np.zeros(SHAPE, np.uint8)], offset=OFFSET
    )
    dst = f"{scheme}{tmp_path}/data"
    with pytest.raises(
        DatasetError, match="all 3 pairs .* blank here.*mip was written"
    ):
        make(spec, dst=dst)
    assert digests(tmp_path / "data") == {}


def test_files_that_were_damaged_since_are_found_when_asked_for(spec, make):
    (path,) = make(spec, "--verify")
    with h5py.File(path, "r+") as file:
        file["img"][1, 0, 3, 4] += 1
    make(spec)  # already exists, nothing to do
    with pytest.raises(DatasetError, match="(?s)damaged.*--overwrite.*pair 1 is not"):
        make(spec, "--verify")
    make(spec, "--verify", "--overwrite")
