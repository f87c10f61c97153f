"""metroem view: what neuroglancer is given, and what the server answers."""

import gc
import gzip
import json

import numpy as np
import pytest
import requests

from metroem.__main__ import main
from metroem.errors import DatasetError, StorageError
from metroem.io.volume_write import write_volume
from metroem.stack.requests import ViewRequest

neuroglancer = pytest.importorskip("neuroglancer", reason="the extra view")
from metroem.stack import view  # noqa: E402

SECTIONS = np.random.default_rng(0).integers(1, 255, (3, 24, 40), np.uint8)
PLACE = {"x": 7, "y": 30, "z": 2, "against": 1, "correlation": 0.25}
PLACE |= {"error_px": 3.5, "jump_px": 3.0, "jump_x_px": 3.0, "jump_y_px": 0.0}


@pytest.fixture
def stack(tmp_path):
    """A folder as align-stack leaves it: image, check.json, stack.json."""
    nm = (4, 4, 45)
    write_volume(tmp_path / "raw", 255 - SECTIONS, 2, resolution=nm, chunk_px=16)
    write_volume(tmp_path / "s" / "image", SECTIONS, 2, resolution=nm, chunk_px=16)
    check = {"worst": [PLACE, PLACE | {"x": 20, "z": 1}]}
    (tmp_path / "s" / "check.json").write_text(json.dumps(check))
    raw = {"request": {"cv_path": str(tmp_path / "raw")}}
    (tmp_path / "s" / "stack.json").write_text(json.dumps(raw))
    yield tmp_path / "s"
    neuroglancer.stop()


def source_of(viewer, layer):
    return viewer.state.layers[layer].source[0].url


def test_the_view_begins_at_the_worst_place(stack):
    viewer = view.make_viewer(ViewRequest(cv_path=str(stack / "image")))
    np.testing.assert_allclose(viewer.state.position, [7, 30, 2.5])
    np.testing.assert_allclose(viewer.state.dimensions.scales, [4e-9, 4e-9, 45e-9])
    points = viewer.state.layers["worst places"].annotations
    assert [one.point.tolist() for one in points] == [[7, 30, 2.5], [20, 30, 1.5]]
    assert points[0].description == (
        "x 7, y 30, z 2 on 1: off by 3.5 px, correlation 0.25"
    )


def test_a_place_that_is_asked_for_is_shown_first(stack):
    request = ViewRequest(cv_path=str(stack / "image"), place=[5, 6, 1])
    np.testing.assert_allclose(view.make_viewer(request).state.position, [5, 6, 1.5])


def test_chunks_of_the_volume_and_of_the_raw_one_are_served(stack):
    viewer = view.make_viewer(ViewRequest(cv_path=str(stack / "image")))
    for layer, sections in (("volume", SECTIONS), ("before", 255 - SECTIONS)):
        form, _, url = source_of(viewer, layer).partition("://")
        assert form == "precomputed"
        info = requests.get(f"{url}/info", timeout=20).json()
        chunk = f"{info['scales'][0]['key']}/16-24_32-40_1-2"
        found = np.frombuffer(requests.get(f"{url}/{chunk}", timeout=20).content, "u1")
        # Stored with x fastest, which is the row of the array.
        np.testing.assert_array_equal(found.reshape(8, 8).T, sections[1, 16:, 32:])


def test_chunks_that_are_stored_with_gzip_are_served(stack):
    (chunk,) = (stack / "image").glob("*/0-16_0-16_2-3")
    data = chunk.read_bytes()
    chunk.with_name(chunk.name + ".gz").write_bytes(gzip.compress(data))
    chunk.unlink()
    viewer = view.make_viewer(ViewRequest(cv_path=str(stack / "image")))
    url = source_of(viewer, "volume").partition("://")[2]
    answer = requests.get(f"{url}/{chunk.parent.name}/{chunk.name}", timeout=20)
    assert answer.content == data and answer.headers["Content-Encoding"] == "gzip"


def test_files_beside_the_volume_are_not_served(stack):
    viewer = view.make_viewer(ViewRequest(cv_path=str(stack / "image")))
    url = source_of(viewer, "volume").partition("://")[2]
    inside = requests.get(f"{url}/info", timeout=20)
    outside = requests.get(f"{url}/..%2Fcheck.json", timeout=20)
    assert (inside.status_code, outside.status_code) == (200, 403)


def test_a_volume_whose_chunks_browsers_cannot_read_is_refused(stack):
    (chunk,) = (stack / "image").glob("*/0-16_0-16_2-3")
    chunk.rename(chunk.with_name(chunk.name + ".br"))
    with pytest.raises(DatasetError, match=r"0-16_0-16_2-3\.br: browsers do not read"):
        view.make_viewer(ViewRequest(cv_path=str(stack / "image")))


def test_a_volume_alone_is_shown_at_its_middle(stack):
    viewer = view.make_viewer(ViewRequest(cv_path=str(stack.parent / "raw")))
    np.testing.assert_allclose(viewer.state.position, [12, 20, 1.5])
    assert [layer.name for layer in viewer.state.layers] == ["volume"]


def test_a_file_that_is_no_check_is_refused(stack):
    request = ViewRequest(cv_path=str(stack / "image"), check=stack / "stack.json")
    with pytest.raises(DatasetError, match=r"stack\.json: has no worst places"):
        view.make_viewer(request)


# The server leaves the socket that it could not bind to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_port_that_is_in_use_is_refused(stack):
    first = view.make_viewer(ViewRequest(cv_path=str(stack / "image")))
    port = int(first.get_viewer_url().split(":")[2].partition("/")[0])
    server, neuroglancer.server.global_server = neuroglancer.server.global_server, None
    try:
        with pytest.raises(StorageError, match=f"--port {port}: cannot be used"):
            view.make_viewer(ViewRequest(cv_path=str(stack / "image"), port=port))
    finally:
        neuroglancer.server.global_server = server
        gc.collect()


def test_ctrl_c_ends_it(stack, monkeypatch, caplog):
    caplog.set_level("INFO", "metroem")

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(view.signal, "pause", interrupt)
    main(["view", "--cv_path", str(stack / "image")])
    assert caplog.messages[-1] == "ended"
    assert "Ctrl-C ends" in caplog.messages[-2]
    assert not neuroglancer.is_server_running()
