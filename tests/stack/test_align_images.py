"""metroem align: images whose displacement is known, and images that are refused."""

import logging
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from metroem.__main__ import main
from metroem.errors import DatasetError, UsageError
from metroem.models.load import load_module
from metroem.models.module_folders import init_pyramid
from metroem.models.weights import checkpoint_path, save_weights
from tests.browser import Browser, find_chromium
from tests.models.specs import CORRELATION, write_spec
from tests.stack.textures import waves

ROWS, COLS = 192, 256  # of an image: y, x


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory):
    """A pyramid of one stage. Its weights are random: the finetuner does the work."""
    path = tmp_path_factory.mktemp("pyramid") / "pyramid"
    (module,) = init_pyramid(path, [0])
    write_spec(module / "model", CORRELATION)
    torch.manual_seed(0)
    loaded: Any = load_module(module, checkpoint_name=None)
    save_weights(loaded.aligner.net, checkpoint_path(module / "model", "checkpoint"))
    return path


@pytest.fixture
def align(tmp_path, pyramid, monkeypatch, caplog):
    """Run the command on two arrays (y, x); return the folder that it ran in."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "metroem")

    def run(src, tgt, *flags, names=("src.png", "tgt.png"), output="out.png"):
        for name, image in zip(names, (src, tgt), strict=True):
            if name.endswith(".npy"):
                np.save(name, image)
            elif name.endswith(".tif"):
                tifffile.imwrite(name, image)
            else:
                Image.fromarray(image).save(name)
        pyramid_flags = ("--pyramid_path", str(pyramid))
        main(["align", *names, "-o", output, *pyramid_flags, *flags])
        return tmp_path

    return run


def image(shift=(0, 0), seed=0, rows=ROWS, cols=COLS):
    """Grey levels, (rows, cols) uint8, moved by `shift` px along y and x."""
    return np.rint(waves(rows, cols, shift, seed)).astype(np.uint8)


def test_an_image_is_laid_on_another_and_its_field_is_in_pixels_of_the_image(align):
    made = align(image((5, -9)), image(), "--field", "field.npy")

    field = np.load(made / "field.npy")
    assert field.shape == (2, ROWS, COLS) and field.dtype == np.float32
    inner = field[:, 24:-24, 24:-24]
    # What lies at p in tgt lies at p + (5 rows, -9 cols) in src.
    assert np.abs(inner - np.array([-9, 5])[:, None, None]).max() < 0.3
    aligned = np.asarray(Image.open(made / "out.png"))
    assert aligned.shape == (ROWS, COLS) and aligned.dtype == np.uint8
    off = np.abs(aligned.astype(float) - image())[24:-24, 24:-24]
    assert off.mean() < 3  # of grey levels with a deviation of 40
    # 9 cols and 5 rows of tgt are not on src: no data.
    assert not aligned[-4:].any() and not aligned[:, :8].any()


def test_without_a_pyramid_the_weights_of_the_package_align(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, shift in (("src.png", (5, -9)), ("tgt.png", (0, 0))):
        Image.fromarray(image(shift)).save(name)
    flags = ("-o", "out.png", "--field", "field.npy", "--no_finetune")

    main(["align", "src.png", "tgt.png", *flags])

    inner = np.load("field.npy")[:, 24:-24, 24:-24]
    assert np.abs(inner - np.array([-9, 5])[:, None, None]).mean() < 0.5
    with pytest.raises(UsageError, match=r"--checkpoint_name x: expected --pyramid"):
        main(["align", "src.png", "tgt.png", "-o", "o.png", "--checkpoint_name", "x"])


def test_what_lies_far_away_is_placed_first_and_sizes_may_differ(align, caplog):
    src = image((60, -80), rows=240, cols=200)

    made = align(src, image(), "--field", "field.npy")

    assert "src was placed first: turned by" in caplog.text
    # Tissue 80 px too far to the left is moved to the right, and 60 up.
    assert "moved by 80 px to the right and 60 px up" in caplog.text
    field = np.load(made / "field.npy")
    inner = field[:, 24:150, 110:-24]
    assert np.abs(inner - np.array([-80, 60])[:, None, None]).max() < 0.5
    assert np.asarray(Image.open(made / "out.png")).shape == (ROWS, COLS)


def test_a_negative_is_aligned_and_stays_a_negative(align, caplog):
    made = align(
        (256 - image((5, -9)).astype(int)).astype(np.uint8),
        image(),
        names=("a.png", "b.png"),
    )

    assert "contrast is inverted" in caplog.text
    aligned = np.asarray(Image.open(made / "out.png")).astype(float)
    off = np.abs(256 - aligned - image())[24:-24, 24:-24]
    assert off.mean() < 3


def test_16_bits_stay_16_bits(align):
    src, tgt = (one.astype(np.uint16) * 200 for one in (image((2, 3)), image()))

    made = align(src, tgt, names=("a.tif", "b.tif"), output="out.tif")

    aligned = tifffile.imread(made / "out.tif")
    assert aligned.dtype == np.uint16 and aligned.max() > 40_000


def test_signed_and_float_grey_levels_are_written_as_floats(align):
    src, tgt = (one.astype(np.int16) - 200 for one in (image((2, 3)), image()))

    with pytest.raises(UsageError, match=r"out.png: a .png .*src is float32; name a"):
        align(src, tgt, names=("a.npy", "b.npy"))
    made = align(src, tgt, names=("a.npy", "b.npy"), output="out.npy")

    aligned = np.load(made / "out.npy")
    assert aligned.dtype == np.float32
    off = np.abs(aligned - tgt)[24:-24, 24:-24]
    assert off.mean() < 3


@pytest.mark.parametrize(
    ("src", "message"),
    [
        (
            image(seed=7),
            "src.png on tgt.png: what the two have in common may be",
        ),
        (0 * image(), "SRC src.png: has no tissue"),
        (0 * image() + 9, "SRC src.png: has no contrast: all pixels with data are 9"),
    ],
    ids=["other tissue", "blank", "flat"],
)
def test_what_cannot_be_aligned_is_refused_and_nothing_is_written(
    align, tmp_path, src, message
):
    with pytest.raises(DatasetError, match=message):
        align(src, image(), "--field", "f.npy", "--report", "r.html")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["src.png", "tgt.png"]


def test_a_file_that_cannot_be_taken_is_named(align, tmp_path, pyramid):
    with pytest.raises(DatasetError, match=r"SRC a.npy: has 2 sections; expected one"):
        align(np.stack([image()] * 2), image(), names=("a.npy", "tgt.png"))
    (tmp_path / "out.png").touch()  # by an earlier run
    with pytest.raises(UsageError, match=r"out.png: exists already"):
        align(image(), image())
    with pytest.raises(UsageError, match=r"--output o.jpg: expected .* .png or .tif"):
        align(image(), image(), output="o.jpg")
    with pytest.raises(UsageError, match="name different files"):
        align(image(), image(), "--field", "o.npy", output="o.npy")
    flags = ("-o", "o.png", "--pyramid_path", str(pyramid))
    (tmp_path / "broken.tif").write_bytes(b"II*\0")
    with pytest.raises(DatasetError, match=r"SRC .*broken.tif"):
        main(["align", "broken.tif", "tgt.png", *flags])
    with pytest.raises(DatasetError, match=r"TGT gone.png: no such file"):
        main(["align", "tgt.png", "gone.png", *flags])


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium here")
def test_the_report_names_both_images_and_has_no_volume(align):
    made = align(image((5, -9)), image(), "--report", "r.html")

    with Browser() as browser:
        browser.load(made / "r.html")
        text = browser.run("document.body.innerText")
        assert "src.png on tgt.png" in text and "Image sets" not in text
        browser.run("location.hash = '#0'")
        browser.wait("document.getElementById('canvas').dataset.shows === '0'")
        assert browser.run(
            "document.getElementById('where').innerText.includes('x, y')"
        )
