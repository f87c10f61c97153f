"""Test that S3 and web servers give the same content as local disk."""

import logging

import h5py
import numpy as np
import pytest

import download_field
import download_image
from metroem.errors import DatasetError
from tests.cloud.servers import KEYS, s3_client, s3_server, serving, upload
from tests.export.sets import export, make_sets
from tests.volumes import make_volume

AREA = "--x_offset 8 --y_offset 16 --z_start 1 --z_end 4".split()


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """A folder with an image volume and a field volume, not square."""
    folder = tmp_path_factory.mktemp("volumes")
    random = np.random.default_rng(0)
    grey = random.integers(1, 255, (5, 1, 100, 140), dtype=np.uint8)
    make_volume(folder / "em", [grey, grey[:, :, ::2, ::2]], chunk=(32, 32, 2))
    fields = random.uniform(3, 9, (5, 2, 100, 140)).astype(np.float32)
    make_volume(folder / "field", [fields, fields[:, :, ::2, ::2]])
    return folder


@pytest.fixture(scope="module")
def s3(volumes):
    """The address of an S3 server whose bucket holds both volumes."""
    with s3_server() as url, pytest.MonkeyPatch.context() as patched:
        upload(url, volumes, "volumes")
        for name, value in {**KEYS, "AWS_ENDPOINT_URL_S3": url}.items():
            patched.setenv(name, value)
        # As most keys are: without a token.
        patched.delenv("AWS_SESSION_TOKEN", raising=False)
        # werkzeug's line for every request.
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        yield url


@pytest.fixture(params=["s3", "http"])
def root(request, volumes):
    """Address of the folder of both volumes, on S3 or on a web server."""
    if request.param == "s3":
        request.getfixturevalue("s3")
        yield "s3://volumes"
        return
    with serving(volumes) as server:
        yield f"precomputed://{server.url}"


def contents(folder):
    """Read the arrays and attributes of a folder's only file, except its source."""
    (path,) = folder.glob("*.h5")
    with h5py.File(path, "r") as file:
        arrays = {key: np.asarray(file[key]) for key in file}
        said = dict(file.attrs.items())
    for key in ("source_path", "command", "request"):
        said.pop(key)
    return path.name, arrays, said


def assert_same(one, other):
    (name, arrays, said), (name_, arrays_, said_) = contents(one), contents(other)
    assert name == name_
    np.testing.assert_equal(arrays, arrays_)
    np.testing.assert_equal(said, said_)


def test_images_are_the_same_from_everywhere(tmp_path, volumes, root):
    for path, name in ((str(volumes), "local"), (root, "cloud")):
        download_image.main(
            ["--cv_path", f"{path}/em", "--dst_folder", str(tmp_path / name), *AREA]
            + "--mip 1 --patch_size 40 --normalize --parallel 2".split()
        )
    assert_same(tmp_path / "local", tmp_path / "cloud")


def test_fields_are_the_same_from_everywhere(tmp_path, volumes, root):
    for path, name in ((str(volumes), "local"), (root, "cloud")):
        download_field.main(
            ["--cv_path", f"{path}/field", "--dst_folder", str(tmp_path / name), *AREA]
            + "--src_mip 1 --dst_mip 0 --patch_size 60".split()
        )
    assert_same(tmp_path / "local", tmp_path / "cloud")


def stored(url, bucket, prefix):
    """Return content and modification time of each object."""
    client = s3_client(url)
    listed = client.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]
    return {
        item["Key"].removeprefix(prefix): (
            client.get_object(Bucket=bucket, Key=item["Key"])["Body"].read(),
            item["LastModified"],
        )
        for item in listed
    }


def test_fields_are_exported_to_s3_as_to_local_disk(tmp_path, s3):
    make_sets(tmp_path / "data")
    images = tmp_path / "images"
    export(tmp_path / "data", tmp_path / "field", "--warped", images)
    export(tmp_path / "data", "s3://volumes/out", "--warped", "s3://volumes/images")
    for local, prefix in ((tmp_path / "field", "out/"), (images, "images/")):
        cloud = stored(s3, "volumes", prefix)
        files = [p for p in local.rglob("*") if p.is_file()]
        assert sorted(cloud) == sorted(str(p.relative_to(local)) for p in files)
        for path in files:
            if path.name != "provenance":  # which has the command
                assert cloud[str(path.relative_to(local))][0] == path.read_bytes()


def test_what_is_on_s3_is_left_and_other_values_are_refused(tmp_path, s3):
    make_sets(tmp_path / "data")
    export(tmp_path / "data", "s3://volumes/again")
    before = stored(s3, "volumes", "again/")
    export(tmp_path / "data", "s3://volumes/again")
    assert stored(s3, "volumes", "again/") == before
    make_sets(tmp_path / "other", offsets=dict.fromkeys(range(4, 8), (2, 4)))
    with pytest.raises(DatasetError, match="s3://volumes/again: section 5 holds other"):
        export(tmp_path / "other", "s3://volumes/again")
    export(tmp_path / "other", "s3://volumes/again", "--overwrite")
    assert stored(s3, "volumes", "again/") != before
