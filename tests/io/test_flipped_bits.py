"""Test that a flipped bit is found anywhere in the stored pairs of a set."""

import random

import h5py
import numpy as np
import pytest

import train
from metroem.__main__ import main
from metroem.data.dataset import find_pairs, read_sample
from metroem.errors import DatasetError, MetroEMError
from metroem.geometry.grid import Grid
from metroem.io.h5 import (
    FieldSet,
    FieldSetMeta,
    ImageSet,
    ImageSetMeta,
    Pair,
    PairLocation,
    write_field_set,
    write_image_set,
)
from metroem.models.module_folders import init_pyramid
from metroem.utils import cli
from tests.image_sets import write_images
from tests.pairs import write_pairs

SHAPE, NUM_PAIRS = (40, 56), 3
IMAGES, FIELDS = "x0_y0_z1_MIP0.h5", "field_0_x0_y0_z1_MIP0_ck.h5"
FLIPS = 12  # for each storage: 48 in all
STORED = {
    "lzf": None,  # as this program writes
    "gzip": {"chunks": (1, 1, 20, 28), "compression": "gzip"},
    "shuffled": {"chunks": (1, 2, 40, 28), "compression": "lzf", "shuffle": True},
    "uncompressed": {"chunks": (1, 1, 20, 56)},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """An image set with masks of defects, and a field set of its pairs."""
    folder = tmp_path_factory.mktemp("written")
    chance = np.random.default_rng(0)
    frames = [PairLocation(Grid(0, 0, 0, *SHAPE), (i + 1, i)) for i in range(NUM_PAIRS)]
    images = chance.standard_normal((NUM_PAIRS, 2, *SHAPE), np.float32)
    masks = chance.random(images.shape) < 0.2
    meta = ImageSetMeta(frames, "", "", {}, normalization={"kind": "tissue"})
    pairs = [Pair(*pair) for pair in images]
    defects = [Pair(*pair) for pair in masks]
    write_image_set(folder / IMAGES, pairs, meta, defects=defects)
    field = np.cumsum(images * 0.3, axis=-1)
    write_field_set(
        folder / FIELDS, field, FieldSetMeta(frames, "", "", {}, stage=0, tag="ck")
    )
    return folder


def copy_stored_as(source, target, how):
    """Copy a set, with its pairs stored in another way."""
    if target != source:
        target.write_bytes(source.read_bytes())
    if how is None:
        return
    with h5py.File(target, "r+") as file:
        for key in {"img", "main", "defects"} & set(file):
            values = file[key][:]
            del file[key]
            file.create_dataset(key, data=values, **how)


def chunks(path):
    """List (first pair, offset in the file, bytes) of each chunk of the pairs."""
    with h5py.File(path) as file:
        for key in sorted({"img", "main", "defects"} & set(file)):
            main = file[key].id
            for number in range(main.get_num_chunks()):
                info = main.get_chunk_info(number)
                yield info.chunk_offset[0], info.byte_offset, info.size


def flip_a_bit(path, chance):
    """Flip one bit of a chunk; return the pair that the chunk belongs to."""
    pair, offset, size = chance.choice(list(chunks(path)))
    content = bytearray(path.read_bytes())
    content[offset + chance.randrange(size)] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return pair


def values_of(path):
    """Read all values of the pairs of a set; None if they cannot be read."""
    try:
        with h5py.File(path) as file:
            keys = sorted({"img", "main", "defects"} & set(file))
            return [file[key][:].tobytes() for key in keys]
    except OSError:
        return None


@pytest.fixture
def failure(monkeypatch, capsys):
    """Run a command that must exit with 1; return its one line of output."""

    def found(call, arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.run(lambda: call(arguments))
        said = capsys.readouterr().err
        assert caught.value.code == 1 and said.startswith("error: ")
        assert "Traceback" not in said
        return said

    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    return found


def refusal(call, *arguments, **more):
    with pytest.raises(DatasetError) as caught:
        call(*arguments, **more)
    return str(caught.value)


@pytest.mark.parametrize("how", STORED)
@pytest.mark.parametrize("name", [IMAGES, FIELDS])
def test_each_flipped_bit_is_found_by_inspect_and_when_the_pair_is_read(
    written, tmp_path, failure, how, name
):
    for other in (IMAGES, FIELDS):
        copy_stored_as(written / other, tmp_path / other, STORED[how])
    good = (tmp_path / name).read_bytes()
    values = values_of(tmp_path / name)
    main(["inspect", str(tmp_path)])  # nothing is wrong so far
    chance = random.Random(f"{how} {name}")
    found = 0
    while found < FLIPS // 2:
        (tmp_path / name).write_bytes(good)
        pair = flip_a_bit(tmp_path / name, chance)
        if values_of(tmp_path / name) == values:
            continue  # a bit without effect, such as padding of a byte
        assert f"{name}: pair {pair} " in failure(main, ["inspect", str(tmp_path)])
        kind = ImageSet if name == IMAGES else FieldSet
        said = refusal(kind(tmp_path / name, verifies=True).read, pair)
        assert f"{tmp_path / name}: pair {pair} " in said
        assert "expected" in said or "cannot be read" in said
        assert "copy it again" in said
        for whole in set(range(NUM_PAIRS)) - {pair}:
            kind(tmp_path / name, verifies=True).read(whole)
        found += 1


def damage(path, pair):
    """Change one value in a corner of a pair."""
    with h5py.File(path, "r+") as file:
        key = "img" if "img" in file else "main"
        file[key][(pair, *[-1] * (file[key].ndim - 1))] += 1


def test_a_pair_is_checked_once_and_whole_though_a_window_is_read(tmp_path):
    write_images(tmp_path, IMAGES, num_pairs=2, mip=0)
    images = ImageSet(tmp_path / IMAGES, verifies=True)
    window = slice(0, 8)
    images.read(0, window, window)
    damage(tmp_path / IMAGES, 0)
    damage(tmp_path / IMAGES, 1)
    images.read(0, window, window)  # read before: not checked again
    assert "pair 1 is not what was written" in refusal(images.read, 1, window, window)
    assert "pair 1 " in refusal(images.read, 1, window, window)  # again
    ImageSet(tmp_path / IMAGES).read(1, window, window)  # not asked for


def test_prior_fields_are_checked_where_their_images_are(written, tmp_path):
    for name in (IMAGES, FIELDS):
        copy_stored_as(written / name, tmp_path / name, None)
    damage(tmp_path / FIELDS, 2)
    for verifies in (False, True):
        refs = find_pairs(tmp_path, 0, stage=1, checkpoint_name="ck", verifies=verifies)
        read_sample(refs[0], refs[0].grid)
        if verifies:
            said = refusal(read_sample, refs[2], refs[2].grid)
            assert f"{FIELDS}: pair 2 is not what was written" in said
        else:
            read_sample(refs[2], refs[2].grid)


def test_sets_of_the_original_have_nothing_to_check_and_say_so(tmp_path, caplog):
    data = np.random.default_rng(0).normal(size=(2, 2, 6, 9)).astype(np.float32)
    with h5py.File(tmp_path / IMAGES, "w") as file:
        file["main"] = data
    read = ImageSet(tmp_path / IMAGES, verifies=True).read(1)
    assert read.src.shape == (6, 9)
    assert f"{IMAGES}: has no checksums" in caplog.text


@pytest.fixture
def run(tmp_path):
    """A pyramid and pairs."""
    write_pairs(tmp_path / "data", mips=(0,), num_pairs=6, shape=(96, 160))
    init_pyramid(tmp_path / "pyramid", [0])
    return tmp_path


@pytest.fixture
def damaged(run):
    """A pyramid and pairs, of which the third has a changed value."""
    damage(run / "data" / IMAGES, 2)
    return run


def flags(run):
    paths = ["--pyramid_path", str(run / "pyramid"), "--dataset_path"]
    return [*paths, str(run / "data"), "--verify"]


ONE_BY_ONE = ["--device", "cpu", "--val_pairs", "0", "--num_workers"]
REFUSED = f"{IMAGES}: pair 2 is not what was written: its checksum is"


@pytest.mark.parametrize("workers", ["0", "2"])
def test_training_refuses_a_damaged_pair(damaged, failure, workers):
    assert REFUSED in failure(train.main, [*flags(damaged), *ONE_BY_ONE, workers])


def test_evaluation_refuses_a_damaged_pair(damaged, failure):
    evaluation = ["evaluate", *flags(damaged), "--no_finetune"]
    assert REFUSED in failure(main, evaluation)


@pytest.mark.parametrize("how", ["gzip", "lzf"])
def test_what_cannot_be_unpacked_is_refused_by_both(run, failure, how):
    path = run / "data" / IMAGES
    copy_stored_as(path, path, STORED[how] or {**STORED["gzip"], "compression": "lzf"})
    good, chance = path.read_bytes(), random.Random(how)
    pair = flip_a_bit(path, chance)
    while values_of(path) is not None:  # until HDF5 itself cannot decompress it
        path.write_bytes(good)
        pair = flip_a_bit(path, chance)
    for call, arguments in (
        (train.main, [*flags(run), *ONE_BY_ONE, "0"]),
        (main, ["evaluate", *flags(run), "--no_finetune"]),
        (main, ["inspect", str(run / "data")]),
    ):
        assert f"{IMAGES}: pair {pair} cannot be read" in failure(call, arguments)


@pytest.mark.slow
def test_a_command_that_finds_a_damaged_pair_exits_with_1(damaged, zygote):
    done = zygote.run(damaged, ["metroem", "inspect", "data"])
    assert done["status"] == 1 and "Traceback" not in done["output"]
    assert f"{IMAGES}: pair 2 is not what was written" in done["errors"]


def test_volumes_have_no_checksums_to_verify(tmp_path):
    (tmp_path / "spec.json").write_text("{}")
    with pytest.raises(MetroEMError, match="--verify: file://v gets CloudVolumes"):
        spec = ["--spec_path", str(tmp_path / "spec.json")]
        main(["make-dataset", *spec, "--dst_path", "file://v", "--verify"])
