import h5py
import numpy as np
import pytest

from metroem.errors import DatasetError, FieldError
from metroem.geometry.grid import Grid
from metroem.io import field_set_writer, h5_write
from metroem.io.field_set_writer import FieldSetWriter
from metroem.io.h5 import FieldSet, FieldSetMeta, PairLocation, verify, write_field_set
from metroem.io.resume import parts_folder

# More than one chunk of 256 px along cols, the last one cut off.
SHAPE = (96, 700)
NAME = "field_0_x0_y0_z1_MIP2_ck.h5"
META = FieldSetMeta(
    frames=[PairLocation(Grid(2, 0, 0, *SHAPE), (1 + i, i)) for i in range(3)],
    source="made by a test",
    command="",
    request={"a": 1},
    stage=0,
    tag="ck",
)


def fields():
    rng = np.random.default_rng(0)
    return [rng.normal(0, 9, (2, *SHAPE)).astype(np.float32) for _ in range(3)]


@pytest.fixture
def parts(tmp_path):
    made = FieldSetWriter(parts_folder(tmp_path / NAME), META.request)
    for index, field in enumerate(fields()):
        made.put(index, field)
    return made


def content(path):
    with h5py.File(path) as file:
        arrays = {key: np.asarray(file[key]) for key in sorted(file)}
        chunks = file["main"].id
        packed = [
            chunks.read_direct_chunk(chunks.get_chunk_info(i).chunk_offset)
            for i in range(chunks.get_num_chunks())
        ]
        return arrays, packed, dict(file.attrs)


def test_joined_parts_are_the_set_that_one_process_writes(parts, tmp_path):
    write_field_set(tmp_path / "whole" / NAME, fields(), META)

    assert list(parts.join(tmp_path / NAME, META)) == [1, 2, 3]

    joined, whole = content(tmp_path / NAME), content(tmp_path / "whole" / NAME)
    assert joined[0].keys() == whole[0].keys()
    for key, array in whole[0].items():
        np.testing.assert_array_equal(joined[0][key], array)
    assert joined[1:] == whole[1:]
    assert verify(tmp_path / NAME) == []
    found = FieldSet(tmp_path / NAME).read(1)
    # Rounded to 0.01 px; smaller values become 0.
    np.testing.assert_allclose(found, fields()[1], rtol=0, atol=0.01)


def test_a_part_of_other_chunks_is_made_again(parts, tmp_path, monkeypatch):
    """Chunks of 512 px, of earlier versions, cannot be copied into a set."""
    monkeypatch.setattr(h5_write, "_CHUNK_PX", 512)
    parts.put(1, fields()[1])
    monkeypatch.undo()
    assert [parts.has(index) for index in range(3)] == [True, False, True]

    parts.put(1, fields()[1])
    list(parts.join(tmp_path / NAME, META))

    assert parts.has(1) and verify(tmp_path / NAME) == []


def test_a_part_that_is_broken_is_made_again(parts):
    path = parts.folder / "1.h5"
    path.write_bytes(path.read_bytes()[:200])
    assert [parts.has(index) for index in (0, 1, 3)] == [True, False, False]
    assert not path.exists()


def test_a_set_is_not_there_before_all_parts_are_joined(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(field_set_writer, "_SEEN_WITHIN_S", 0.0)
    (parts.folder / "2.h5").unlink()
    with pytest.raises(DatasetError, match="2.h5: this part is missing"):
        list(parts.join(tmp_path / NAME, META))
    assert [path.name for path in tmp_path.iterdir()] == [parts.folder.name]


def test_a_part_of_another_shape_is_refused(parts, tmp_path):
    parts.put(1, np.zeros((2, 96, 512), np.float32))
    with pytest.raises(DatasetError, match=r"pair 1 is \(2, 96, 512\)"):
        list(parts.join(tmp_path / NAME, META))


def test_a_field_that_is_not_finite_is_refused(parts):
    field = fields()[0]
    field[1, 3, 4] = np.nan
    with pytest.raises(FieldError, match="NaN or infinite"):
        parts.put(0, field)


def test_parts_of_another_request_are_refused(parts):
    with pytest.raises(DatasetError, match="a 1"):
        FieldSetWriter(parts.folder, {"a": 2})
