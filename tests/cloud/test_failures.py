"""Test that failing storage ends a command: one clear line, exit code 1, in time."""

import itertools
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from metroem.io import cloud_errors, cloud_retry
from tests.cloud.servers import KEYS, s3_client, s3_server, serving
from tests.export.sets import make_sets
from tests.volumes import make_volume

LONGEST_S = 30
DOWNLOAD = ["download_image.py", "--mip", "0", "--patch_size", "48"]
DOWNLOAD += ["--z_start", "1", "--z_end", "3", "--dst_folder", "data", "--cv_path"]


@pytest.fixture
def bucket(tmp_path):
    """A folder that a server serves; its only bucket holds a volume."""
    grey = np.random.default_rng(0).integers(1, 255, (4, 1, 64, 96), dtype=np.uint8)
    # More chunks in a patch than cloud-files has threads.
    make_volume(tmp_path / "server" / "embucket" / "em", [grey], chunk=(8, 8, 1))
    return tmp_path / "server"


@pytest.fixture
def fails(tmp_path, zygote):
    """Return a function that runs a command without credentials for its error line."""

    def run(*words, **environment):
        kept = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
        # No server answers there, so no cloud is asked for an identity.
        kept |= {"AWS_EC2_METADATA_DISABLED": "true", "NO_GCE_CHECK": "true"}
        done = zygote.run(tmp_path, words, environment=kept | environment)
        assert done["status"] == 1, done["output"]
        assert done["seconds"] < LONGEST_S
        (line,) = done["errors"].splitlines()
        assert line.startswith("error: ")
        return line

    return run


def test_what_is_changed_in_other_packages_was_tried_with_their_pinned_versions():
    pinned = (Path(__file__).parents[2] / "requirements.txt").read_text().split()
    assert cloud_retry.TESTED_WITH in pinned
    assert set(cloud_errors.TESTED_WITH) <= set(pinned)


def test_missing_s3_credentials(fails, bucket):
    with serving(bucket) as server:
        line = fails(*DOWNLOAD, "s3://embucket/em", AWS_ENDPOINT_URL_S3=server.url)
    assert "s3://embucket/em" in line and "NoCredentialsError" in line
    assert "there are no credentials: put them into ~/.cloudvolume/secrets" in line


def test_missing_google_credentials(fails):
    line = fails(*DOWNLOAD, "gs://embucket/em")
    assert "DefaultCredentialsError" in line
    assert "there are no credentials: put them into ~/.cloudvolume/secrets" in line


def test_a_wrong_bucket(fails):
    with s3_server() as url:
        keys = KEYS | {"AWS_ENDPOINT_URL_S3": url}
        assert "there is no such bucket" in fails(*DOWNLOAD, "s3://nobucket/em", **keys)


def test_a_path_without_a_volume(fails, bucket):
    with s3_server() as url, serving(bucket) as server:
        s3_client(url).create_bucket(Bucket="embucket")
        keys = KEYS | {"AWS_ENDPOINT_URL_S3": url}
        on_s3 = fails(*DOWNLOAD, "s3://embucket/nothing", **keys)
        on_web = fails(*DOWNLOAD, f"precomputed://{server.url}/nothing/there")
    assert "no volume there" in on_s3 and "no volume there" in on_web


def paths(url):
    """What stands for one volume on both kinds of server, with keys for it."""
    keys = KEYS | {"AWS_ENDPOINT_URL_S3": url}
    return {
        "s3": ("s3://embucket/em", keys),
        "http": (f"precomputed://{url}/embucket/em", {}),
    }


@pytest.mark.parametrize("kind", ["s3", "http"])
@pytest.mark.parametrize("bad_for", ["info", "4_4_40"])
def test_a_403(fails, bucket, kind, bad_for):
    with serving(bucket, "403", bad_for) as server:
        path, keys = paths(server.url)[kind]
        line = fails(*DOWNLOAD, path, **keys)
    assert path in line and "your credentials" in line


@pytest.mark.slow
@pytest.mark.long
def test_connections_that_are_dropped_or_hang_or_never_come(fails, bucket):
    def served(bad, bad_for, kind):
        with serving(bucket, bad, bad_for) as server:
            path, keys = paths(server.url)[kind]
            folder = f"{bad}_{bad_for}_{kind}"  # one each: they run side by side
            return path, fails(*DOWNLOAD, path, "--dst_folder", folder, **keys)

    def nobody(kind):
        with serving(Path(__file__).parent) as server:
            url = server.url
        path, keys = paths(url)[kind]
        return path, fails(*DOWNLOAD, path, "--dst_folder", kind, **keys)

    cases = [
        *itertools.product(["drop", "hang"], ["info", "4_4_40"], ["s3", "http"]),
        ("s3",),
        ("http",),
    ]
    # Each of them waits for its 12 s or twice that.
    with ThreadPoolExecutor(5) as pool:
        jobs = [pool.submit(served if len(c) > 1 else nobody, *c) for c in cases]
        for path, line in (job.result() for job in jobs):
            assert path in line and "check the path, the network and" in line


def test_an_export_that_may_not_be_written(fails, tmp_path, bucket):
    make_sets(tmp_path / "sets")
    command = ["metroem", "export-fields", "--dataset_path", "sets"]
    with serving(bucket, "403") as server:
        path, keys = paths(server.url)["s3"]
        line = fails(*command, "--dst_path", path, **keys)
    assert "--dst_path s3://embucket/em: cannot be written" in line
    assert "check that your credentials are right and allow it" in line


def test_keys_come_from_the_environment_or_from_the_secrets(fails, bucket):
    secrets = Path(os.environ["HOME"]) / ".cloudvolume" / "secrets"
    with serving(bucket, "403") as server:
        path, keys = paths(server.url)["s3"]
        fails(*DOWNLOAD, path, **keys)
        assert server.keys == {"a-key"}
        secrets.mkdir(parents=True, exist_ok=True)  # task-queue makes it, too
        mine = {"AWS_ACCESS_KEY_ID": "my-key", "AWS_SECRET_ACCESS_KEY": "b"}
        (secrets / "aws-secret.json").write_text(json.dumps(mine))
        server.keys.clear()
        try:
            fails(*DOWNLOAD, path, AWS_ENDPOINT_URL_S3=server.url)
        finally:
            shutil.rmtree(secrets)
        assert server.keys == {"my-key"}


def test_a_server_in_the_path_of_a_bucket_is_refused_with_what_works(fails):
    line = fails(*DOWNLOAD, "s3://http://127.0.0.1:9000/embucket/em")
    assert "set AWS_ENDPOINT_URL_S3=http://127.0.0.1:9000 and give s3://embuck" in line
