"""Sections in image files: what is read, in which order, and what is refused."""

import logging
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from metroem.errors import DatasetError
from metroem.io.image_files import (
    UnreadableSection,
    as_grey,
    number_sections,
    open_stack,
)
from tests.volumes import make_volume

ROWS, COLS = 23, 37


def greys(seed=0, rows=ROWS, cols=COLS, dtype=np.uint8):
    """An image, rows = y and cols = x, with a row of 0."""
    made = np.random.default_rng(seed).integers(1, 255, (rows, cols)).astype(dtype)
    made[5] = 0
    return made


def whole(stack, z):
    """The image of a section, rows = y, read in two bands."""
    rows = stack.sections[z].shape[0]
    parts = [range(0, 10), range(10, rows)]
    return np.concatenate([stack.read(range(z, z + 1), p)[0].T for p in parts])


def save(folder, name, image, **how):
    folder.mkdir(exist_ok=True)
    Image.fromarray(image).save(folder / name, **how)


def test_a_number_in_names_is_z_and_gaps_stay():
    names = [f"s{z}.png" for z in (10, 2, 4, 3, 5, 6, 7, 8, 1)]
    found = number_sections(names, "folder")
    assert found == {z: f"s{z}.png" for z in (1, 2, 3, 4, 5, 6, 7, 8, 10)}


@pytest.mark.parametrize(
    ("names", "zs"),
    [
        (["run7_z001_2020.png", "run7_z002_2020.png"], [1, 2]),
        # Of two numbers that count, the last.
        (["5_0010.tif", "6_0011.tif", "7_0012.tif"], [10, 11, 12]),
        # Times of the day do not count sections.
        (["z1_121314.tif", "z2_121549.tif", "z3_121901.tif"], [1, 2, 3]),
        (["z0007.png"], [7]),
        (["fib25.png"], [0]),
        # Natural order.
        (["image2.png", "other9.png", "other10.png"], [0, 1, 2]),
        (["t3.png", "t100.png", "t20000.png"], [0, 1, 2]),
    ],
)
def test_numbers_count_sections_where_they_can(names, zs):
    found = number_sections(sorted(names), "folder")
    assert found == dict(zip(zs, names, strict=True))


@pytest.mark.parametrize(
    ("names", "twice"),
    [
        (["s1.png", "s01.png", "s2.png"], "s1.png and s01.png|s01.png and s1.png"),
        (["s1.png", "s1.tif"], "s1.png and s1.tif"),
        (["z3_r1_c1.png", "z3_r1_c2.png", "z3_r2_c1.png"], "z3_r1_c1.png and z3_r2"),
    ],
)
def test_two_files_of_one_number_are_refused_by_name(names, twice):
    with pytest.raises(DatasetError, match=rf"({twice}).* both section"):
        number_sections(names, "folder")


def test_images_are_transposed_into_the_volume(tmp_path):
    image = greys()
    save(tmp_path / "s", "a.png", image)
    stack = open_stack(str(tmp_path / "s"))
    read = stack.read(range(0, 1), range(4, 9))
    assert read.shape == (1, COLS, 5)
    assert read[0, 30, 2] == image[6, 30]


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("a.png", "L"),
        ("a.png", "RGB"),
        ("a.png", "P"),
        ("a.bmp", "RGB"),
        ("a.tif", "RGB"),
        ("a.tif", "P"),
        ("a.pgm", "L"),
    ],
)
def test_grey_images_are_read_whatever_their_mode(tmp_path, name, mode):
    image = greys()
    (tmp_path / "s").mkdir()
    Image.fromarray(image).convert(mode).save(tmp_path / "s" / name)
    stack = open_stack(str(tmp_path / "s"))
    np.testing.assert_array_equal(whole(stack, 0), image)
    assert stack.sections[0].dtype == np.uint8


def test_what_is_transparent_is_blank(tmp_path):
    image = greys()
    alpha = np.full_like(image, 255)
    alpha[10:12] = 0
    truth = image.copy()
    truth[10:12] = 0
    save(tmp_path / "s", "s1.png", np.dstack([image, alpha]))
    save(tmp_path / "s", "s2.png", np.dstack([image] * 3 + [alpha]))
    stack = open_stack(str(tmp_path / "s"))
    for z in (1, 2):
        np.testing.assert_array_equal(whole(stack, z), truth)


def test_1_bit_becomes_0_and_255(tmp_path):
    image = greys() > 99
    save(tmp_path / "s", "a.png", image)
    np.testing.assert_array_equal(
        whole(open_stack(str(tmp_path / "s")), 0), image * np.uint8(255)
    )


def test_colour_is_refused_with_a_pixel():
    image = np.dstack([greys()] * 3)
    image[7, 3] = 10, 20, 30
    with pytest.raises(UnreadableSection, match="red 10, green 20, blue 30 at row 7"):
        as_grey(image)


def test_colour_below_what_is_transparent_does_not_count():
    image = np.dstack([greys()] * 3 + [np.full((ROWS, COLS), 255, np.uint8)])
    image[7, 3] = 10, 20, 30, 0
    assert as_grey(image)[7, 3] == 0
    image[7, 3, 3] = 1
    with pytest.raises(UnreadableSection, match="in colour"):
        as_grey(image)


def test_a_png_of_16_bit_in_several_channels_is_refused(tmp_path):
    # By hand: Pillow writes none.
    head = struct.pack(">IIBBBBB", 4, 3, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + bytes(4 * 6) for _ in range(3))
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        crc = zlib.crc32(kind + body)
        content += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)
    (tmp_path / "a.png").write_bytes(content)
    stack = open_stack(str(tmp_path))
    assert "16 bit in several channels" in stack.broken[0]


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32, np.float32])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"compression": "zlib", "rowsperstrip": 7},
        {"compression": "zlib", "predictor": 2, "rowsperstrip": 8},
        {"tile": (16, 16), "compression": "zlib"},
        {"tile": (16, 32)},
        {"byteorder": ">", "rowsperstrip": 4},
        {"bigtiff": True},
    ],
    ids=str,
)
def test_tiffs_are_read_in_parts(tmp_path, dtype, how):
    if how.get("predictor") and dtype is np.float32:
        how = {**how, "predictor": 1}
    image = greys(dtype=dtype) - (100 if dtype is np.int16 else 0)
    (tmp_path / "s").mkdir()
    tifffile.imwrite(tmp_path / "s" / "s3.tif", image, **how)
    tifffile.imwrite(tmp_path / "s" / "s4.tif", image + 1, **how)
    stack = open_stack(str(tmp_path / "s"))
    assert stack.sections[3].dtype == dtype
    np.testing.assert_array_equal(whole(stack, 4), image + 1)
    np.testing.assert_array_equal(whole(stack, 3), image)


@pytest.mark.parametrize("compression", ["tiff_lzw", "jpeg", "tiff_deflate"])
def test_compressions_that_tifffile_does_not_know_are_read_by_pillow(
    tmp_path, compression
):
    image = np.full((ROWS, COLS), 77, np.uint8)  # jpeg keeps it
    save(tmp_path / "s", "a.tif", image, compression=compression)
    np.testing.assert_array_equal(whole(open_stack(str(tmp_path / "s")), 0), image)


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_where_0_is_white_greys_are_inverted(tmp_path, photometric):
    image = greys(dtype=np.uint16)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, image, photometric=photometric, compression="zlib")
    truth = image if photometric == "minisblack" else 65535 - image
    np.testing.assert_array_equal(whole(open_stack(str(path)), 0), truth)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"imagej": True, "metadata": {"axes": "ZYX"}},
        {"imagej": True, "metadata": {"axes": "TYX"}},
        {"ome": True, "metadata": {"axes": "ZYX"}},
        {"compression": "zlib", "metadata": {"axes": "ZYX"}},
        {"metadata": None, "bigtiff": True},
        {"metadata": None, "compression": "zlib"},
    ],
    ids=str,
)
def test_pages_of_a_tiff_are_sections(tmp_path, how):
    images = np.stack([greys(seed) for seed in range(4)])
    path = tmp_path / "stack.tif"
    tifffile.imwrite(path, images, photometric="minisblack", **how)
    stack = open_stack(str(path))
    assert list(stack.sections) == [0, 1, 2, 3] and not stack.missing
    for z in (2, 0, 3, 1):
        np.testing.assert_array_equal(whole(stack, z), images[z])


def test_pages_that_were_added_one_by_one_are_sections_of_their_sizes(tmp_path):
    images = [greys(0), greys(1, ROWS + 4, COLS), greys(2, ROWS, COLS + 2)]
    with tifffile.TiffWriter(tmp_path / "stack.tif") as tiff:
        for image in images:
            tiff.write(image)
    stack = open_stack(str(tmp_path / "stack.tif"))
    assert stack.shape == (ROWS + 4, COLS + 2)
    for z, image in enumerate(images):
        np.testing.assert_array_equal(whole(stack, z), image)


def test_a_stack_of_imagej_with_one_page_for_all_its_bytes_is_whole(tmp_path):
    # As ImageJ writes more than 4 GB: one page, and the other sections behind it.
    images = np.stack([greys(seed, dtype=np.uint16) for seed in range(3)])
    path = tmp_path / "stack.tif"
    tifffile.imwrite(path, images, imagej=True, truncate=True, metadata={"axes": "ZYX"})
    with tifffile.TiffFile(path) as tiff:
        assert len(tiff.pages) == 1
    stack = open_stack(str(path))
    assert len(stack.sections) == 3
    for z in range(3):
        np.testing.assert_array_equal(whole(stack, z), images[z])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DatasetError, match="stack.tif: is cut short"):
        open_stack(str(path))


@pytest.mark.parametrize(
    "how",
    [
        {"metadata": None, "compression": "zlib"},
        {"compression": "zlib"},
        {"ome": True, "compression": "zlib"},
        {"metadata": None},
        {"bigtiff": True, "compression": "zlib"},
    ],
    ids=str,
)
@pytest.mark.parametrize("fraction", [0.3, 0.6, 0.9])
def test_a_stack_that_is_cut_short_is_never_taken_for_a_short_one(
    tmp_path, how, fraction
):
    images = np.stack([greys(seed) for seed in range(6)])
    path = tmp_path / "stack.tif"
    tifffile.imwrite(path, images, photometric="minisblack", **how)
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    try:
        stack = open_stack(str(path))
        if stack.broken:
            raise DatasetError(stack.broken[5])
    except DatasetError as error:
        assert "stack.tif" in str(error)
        return
    # OME's text lies behind all images.
    assert how.get("ome") and fraction == 0.9 and len(stack.sections) == 6
    for z, image in enumerate(images):
        np.testing.assert_array_equal(whole(stack, z), image)


@pytest.mark.parametrize(
    ("axes", "shape", "words"),
    [
        ("CYX", (2, ROWS, COLS), "channels; expected .*save one channel"),
        ("ZCYX", (3, 2, ROWS, COLS), "channels; expected .*save one channel"),
        ("TZYX", (3, 2, ROWS, COLS), "save one time, or one depth"),
    ],
)
def test_channels_and_times_are_refused(tmp_path, axes, shape, words):
    path = tmp_path / "stack.tif"
    image = np.zeros(shape, np.uint8)
    tifffile.imwrite(path, image, imagej=True, metadata={"axes": axes})
    with pytest.raises(DatasetError, match=rf"stack.tif: .*{words}"):
        open_stack(str(path))


def test_metadata_state_the_size_of_voxels(tmp_path):
    images = np.stack([greys(seed) for seed in range(3)])
    nm = 1e-3
    tifffile.imwrite(
        tmp_path / "ij.tif",
        images,
        imagej=True,
        photometric="minisblack",
        resolution=(1 / (4.6 * nm), 1 / (4.8 * nm)),
        metadata={"axes": "ZYX", "unit": "um", "spacing": 0.045},
    )
    ome = {"axes": "ZYX", "PhysicalSizeX": 8, "PhysicalSizeXUnit": "nm"}
    ome |= {"PhysicalSizeY": 0.009, "PhysicalSizeYUnit": "µm"}
    tifffile.imwrite(
        tmp_path / "ome.tif", images, ome=True, photometric="minisblack", metadata=ome
    )
    tifffile.imwrite(tmp_path / "plain.tif", images[0], resolution=(72, 72))
    stated = [open_stack(str(tmp_path / f"{n}.tif")) for n in ("ij", "ome", "plain")]
    assert stated[0].resolution == pytest.approx((4.6, 4.8, 45), rel=1e-6)
    assert stated[1].resolution == (8, pytest.approx(9), None)
    assert stated[2].resolution == (None, None, None)


@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_is_read_by_section(tmp_path, order):
    images = np.stack([greys(seed, dtype=np.int16) for seed in range(3)])
    np.save(tmp_path / "a.npy", np.asarray(images, ">i2", order=order))
    stack = open_stack(str(tmp_path / "a.npy"))
    for z in range(3):
        np.testing.assert_array_equal(whole(stack, z), images[z])


@pytest.mark.parametrize(
    "array", [np.zeros((2, 3, 4, 5)), np.zeros((0, 3, 4)), np.zeros((2, 3), complex)]
)
def test_arrays_of_another_form_are_refused(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DatasetError, match="a.npy: holds .*expected grey levels"):
        open_stack(str(tmp_path / "a.npy"))


def test_an_array_that_is_cut_short_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", greys())
    path = tmp_path / "a.npy"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DatasetError, match="a.npy: cannot be read"):
        open_stack(str(path))


def test_a_volume_has_its_axes_in_order_already(tmp_path):
    data = np.random.default_rng(0).integers(0, 255, (4, 1, 50, 40), np.uint8)
    path = make_volume(tmp_path / "v", [data], offset=(3, 5, 7), chunk=(32, 16, 2))
    stack = open_stack(path)
    assert stack.corner == (3, 5) and stack.span == range(7, 11)
    assert stack.shape == (40, 50) and stack.resolution == (4, 4, 40)
    assert stack.layers() == [range(7, 9), range(9, 11)]
    read = stack.read(range(9, 11), range(16, 40))
    np.testing.assert_array_equal(read, data[2:, 0, :, 16:40])


def test_what_is_passed_over_in_a_folder_is_named(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = tmp_path / "s"
    save(folder, "s1.png", greys())
    (folder / "notes.txt").write_text("x")
    (folder / ".hidden").write_text("x")
    (folder / "raw").mkdir()
    open_stack(str(folder))
    assert "passed over: raw/, notes.txt, 1 hidden" in caplog.text


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["day1/a.png", "day2/a.png"], r"sub-folders \(day1, day2\).*give one of them"),
        (["a.txt"], "holds a.txt; expected images"),
        ([], "holds nothing; expected images"),
    ],
)
def test_a_folder_without_images_is_refused(tmp_path, names, words):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    with pytest.raises(DatasetError, match=words):
        open_stack(str(tmp_path))


def test_files_that_are_broken_are_named_by_their_headers(tmp_path):
    folder = tmp_path / "s"
    for z in (1, 2, 3, 6):
        save(folder, f"s{z}.tif", greys(z))
    (folder / "s4.tif").write_bytes(b"")
    content = (folder / "s3.tif").read_bytes()
    (folder / "s3.tif").write_bytes(content[:300])
    tifffile.imwrite(folder / "s7.tif", greys(dtype=np.uint16))
    tifffile.imwrite(folder / "s8.tif", np.stack([greys()] * 2))
    stack = open_stack(str(folder))
    assert sorted(stack.sections) == [1, 2, 6]
    words = {3: "s3.tif: ", 4: "s4.tif: ", 5: "no file", 7: "is uint16", 8: "2 pages"}
    assert list(stack.missing) == list(words)
    for z, part in words.items():
        assert part in stack.missing[z]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_an_image_that_is_cut_short_is_named_when_it_is_read(tmp_path, name):
    image = greys(rows=200, cols=300)
    save(tmp_path / "s", name, image)
    path = tmp_path / "s" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DatasetError, match=name):
        stack = open_stack(str(tmp_path / "s"))
        if stack.broken:
            raise DatasetError(stack.broken[0])
        whole(stack, 0)


def test_a_strip_that_is_cut_short_inside_is_not_filled_up(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, greys(), compression="zlib", rowsperstrip=ROWS)
    with tifffile.TiffFile(path) as tiff:
        start = tiff.pages[0].dataoffsets[0]
    content = bytearray(path.read_bytes())
    content[start + 40 :] = bytes(len(content) - start - 40)
    path.write_bytes(content)
    with pytest.raises(UnreadableSection, match="a.tif"):
        whole(open_stack(str(path)), 0)


def test_other_files_are_refused_with_what_is_taken(tmp_path):
    (tmp_path / "a.mrc").write_text("x")
    with pytest.raises(DatasetError, match="is a .mrc; expected a folder of images"):
        open_stack(str(tmp_path / "a.mrc"))
    with pytest.raises(DatasetError, match="no such file or folder"):
        open_stack(str(tmp_path / "nowhere"))
