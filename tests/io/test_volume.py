import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from google.auth.exceptions import DefaultCredentialsError

from metroem.errors import DatasetError
from metroem.geometry.grid import Grid
from metroem.io.cloud_paths import cloud_path
from metroem.io.volume import Volume, bounding_grid, crop_array, iter_sections
from tests.volumes import ReadCount, make_volume

# (Z, C, X, Y): sections 10...15, x from 64 and y from -32 on.
OFFSET = (64, -32, 10)


@pytest.fixture
def data():
    random = np.random.default_rng(0)
    return random.integers(1, 255, (6, 1, 100, 80), dtype=np.uint8)


@pytest.fixture
def path(tmp_path, data):
    coarse = data[:, :, ::2, ::2]
    return make_volume(
        tmp_path / "em", [data, coarse], offset=OFFSET, chunk=(32, 32, 4)
    )


def test_rows_run_along_x_and_cols_along_y(path, data):
    read = Volume(path).read(Grid(0, 70, -20, 50, 40), range(11, 13))
    np.testing.assert_array_equal(read, data[1:3, :, 6:56, 12:52])


def test_a_coarser_mip_is_read_at_its_own_pixels(path, data):
    read = Volume(path).read(Grid(1, 70, -20, 20, 10), range(15, 16))
    np.testing.assert_array_equal(read, data[5:, :, 6:46:2, 12:32:2])


def test_what_lies_outside_is_blank(path, data):
    read = Volume(path).read(Grid(0, 54, 28, 20, 40), range(10, 11))[0, 0]
    assert not read[:10].any()
    assert not read[:, 20:].any()
    np.testing.assert_array_equal(read[10:, :20], data[0, 0, :10, 60:])
    assert not Volume(path).read(Grid(0, 5000, 0, 3, 4), range(10, 11)).any()


def test_a_plain_path_is_a_local_one(tmp_path, path, monkeypatch):
    assert cloud_path("gs://bucket/em/") == "gs://bucket/em"
    assert cloud_path(str(tmp_path / "em")) == path
    monkeypatch.chdir(tmp_path)
    assert Volume("em").path == path
    assert Volume(f"precomputed://{path}").mips == [0, 1]


def test_the_resolution_is_that_of_mip_0(path):
    volume = Volume(path)
    assert volume.resolution == (4, 4, 40)
    assert volume.dtype == np.uint8


@pytest.mark.parametrize("mip", [-1, 2])
def test_a_mip_that_is_not_there_is_refused_with_those_that_are(path, mip):
    with pytest.raises(DatasetError, match=f"--mip {mip}.*available: 0, 1"):
        Volume(path).check_mip("--mip", mip)


def test_a_scale_that_halves_z_is_no_mip(tmp_path, path):
    info = tmp_path / "em" / "info"
    content = json.loads(info.read_text())
    content["scales"][1]["resolution"] = [8, 8, 80]
    info.write_text(json.dumps(content))
    match = "--mip 1: .* of 8x8x40 nm; available: 0; its scales are 4x4x40 nm, 8x8x80"
    with pytest.raises(DatasetError, match=match):
        Volume(path).check_mip("--mip", 1)


@pytest.mark.parametrize(
    "grid",
    [
        Grid(0, 60, 0, 10, 10),
        Grid(0, 64, -40, 10, 10),
        Grid(0, 160, 0, 10, 4),
        Grid(1, 64, 0, 4, 30),
    ],
)
def test_an_area_beyond_the_bounds_is_refused_with_the_bounds(path, grid):
    with pytest.raises(DatasetError, match=r"the volume x 64\.\.\.164, y -32\.\.\.48"):
        Volume(path).check_covers(grid, "the patch")


@pytest.mark.parametrize("sections", [range(9, 12), range(12, 17)])
def test_sections_beyond_the_bounds_are_refused(path, sections):
    with pytest.raises(DatasetError, match=r"holds 10\.\.\.15"):
        Volume(path).check_sections(sections, 1)


def test_all_of_the_volume_is_inside_its_bounds(path):
    Volume(path).check_covers(Grid(1, 64, -32, 50, 40), "the patch")
    Volume(path).check_sections(range(10, 16), 1)


def test_another_scale_or_number_of_channels_is_refused(tmp_path, path, data):
    other = make_volume(tmp_path / "other", [data], resolution=(8, 8, 50))
    with pytest.raises(DatasetError, match="mean the same"):
        Volume(other, resolution=Volume(path).resolution)
    with pytest.raises(DatasetError, match="1 channels, a field has 2"):
        Volume(path).check_channels(2, "a field")


def test_a_path_without_a_volume_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="--cv_path file://.*check the path"):
        Volume(str(tmp_path))
    (tmp_path / "info").write_text("{")
    with pytest.raises(DatasetError, match="info file is broken"):
        Volume(str(tmp_path))


def test_a_chunk_that_cannot_be_read_is_named(tmp_path, path):
    (chunk,) = (tmp_path / "em" / "4_4_40").glob("64-96_-32-0_10-14*")
    chunk.write_bytes(b"short")
    with pytest.raises(DatasetError, match="em: cannot be read"):
        Volume(path).read(Grid(0, 64, -32, 5, 6), range(10, 11))


def test_missing_credentials_are_said(monkeypatch):
    def refuse(*args, **kwargs):
        raise DefaultCredentialsError("no default credentials")

    monkeypatch.setattr("metroem.io.volume.CloudVolume", refuse)
    with pytest.raises(
        DatasetError, match="gs://em.*DefaultCred.*there are no credentials: put"
    ):
        Volume("gs://em")


class _Forbidding(SimpleHTTPRequestHandler):
    """Server that serves the info, and answers 403 for chunks."""

    def do_GET(self):
        if self.path.endswith("info"):
            super().do_GET()
        else:
            self.send_error(403)

    def log_message(self, *args):
        pass


def test_chunks_that_may_not_be_read_are_named(tmp_path, path):
    # To cloud-volume they are missing, which is blank.
    handler = partial(_Forbidding, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"precomputed://http://127.0.0.1:{server.server_port}/em"
            with pytest.raises(DatasetError, match="64-96_-32-0_10-14: HTTPError: 403"):
                Volume(url).read(Grid(0, 70, -20, 5, 4), range(11, 12))
        finally:
            server.shutdown()
            thread.join()


def test_an_error_of_ours_keeps_its_traceback(path, monkeypatch):
    volume = Volume(path)
    monkeypatch.setattr(volume, "_at", lambda mip: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        volume.read(Grid(0, 64, -32, 5, 6), range(10, 11))


def test_sections_of_one_layer_of_chunks_are_read_together(path):
    volume = Volume(path)
    assert volume.slabs(0, [11, 12, 14, 15]) == [range(11, 13), range(14, 16)]


@pytest.mark.parametrize("parallel", [1, 4])
def test_each_section_arrives_and_each_chunk_is_read_once(
    path, data, monkeypatch, parallel
):
    count = ReadCount(monkeypatch)
    windows = {z: Grid(0, 66 + z, -30, 40, 33) for z in (10, 12, 13, 15)}
    sections = iter_sections(Volume(path), windows, parallel=parallel)
    arrived = {z: layers.copy() for z, layers in sections}
    assert set(count.times.values()) == {1}
    assert sorted(arrived) == sorted(windows)
    for z, layers in arrived.items():
        row = 2 + z
        expected = data[z - 10, :, row : row + 40, 2:35]
        np.testing.assert_array_equal(layers, expected)


def test_nothing_is_read_when_nothing_is_wanted(path):
    assert not list(iter_sections(Volume(path), {}))


def test_an_error_while_reading_is_not_lost(path, monkeypatch):
    monkeypatch.setattr(Volume, "read", lambda self, grid, sections: {}[sections])
    windows = {z: Grid(0, 64, 0, 4, 5) for z in (10, 14)}
    with pytest.raises(KeyError):
        list(iter_sections(Volume(path), windows, parallel=2))


def test_a_cut_of_a_covering_grid_is_the_part_asked_for():
    a, b = Grid(1, 10, 4, 3, 5), Grid(1, 14, 0, 4, 4)
    hull = bounding_grid([a, b])
    assert hull == Grid(1, 10, 0, 6, 7)
    array = np.arange(42).reshape(6, 7)
    np.testing.assert_array_equal(crop_array(array, hull, a), array[:3, 2:7])
    np.testing.assert_array_equal(crop_array(array, hull, b), array[2:, :4])


def test_after_a_failure_no_other_layer_is_begun(path, monkeypatch):
    begun = []

    def fail(self, grid, sections):
        begun.append(sections)
        raise DatasetError("cannot be read")

    monkeypatch.setattr(Volume, "read", fail)
    windows = {z: Grid(0, 64, 0, 4, 5) for z in (10, 14)}
    with pytest.raises(DatasetError):
        list(iter_sections(Volume(path), windows))
    assert begun == [range(10, 11)]


def test_a_single_pixel_of_a_field_keeps_its_axes(tmp_path):
    fields = np.random.default_rng(0).normal(size=(2, 2, 40, 56)).astype(np.float32)
    volume = Volume(make_volume(tmp_path / "field", [fields]))
    read = volume.read(Grid(0, 35, 7, 1, 1), range(1, 2))
    np.testing.assert_array_equal(read, fields[1:, :, 35:36, 7:8])


def test_a_mip_that_is_not_there_names_the_command_that_adds_it(tmp_path):
    data = np.ones((3, 1, 40, 30), np.uint8)
    path = make_volume(tmp_path / "v", [data])
    with pytest.raises(DatasetError, match=rf"metroem import {path} --mips 3 adds it"):
        Volume(path).check_mip("--mip", 2)
    fields = make_volume(tmp_path / "f", [np.ones((3, 2, 40, 30), np.float32)])
    with pytest.raises(DatasetError) as refused:
        Volume(fields).check_mip("--mip", 2)
    assert "metroem import" not in str(refused.value)
