"""Test that folders of any name, and ~, mean the same folder in all flags."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import cloudfiles.paths
import numpy as np
import pytest
from cloudvolume import CloudVolume

import download_image
from metroem.__main__ import build_parser, main
from metroem.errors import DatasetError
from metroem.evaluation.report.page import neuroglancer_source
from metroem.geometry.grid import Grid
from metroem.io.cloud_paths import FORMATS, check_source, cloud_path
from metroem.io.volume import Volume
from metroem.io.volume_write import write_volume
from metroem.models.module_folders import fetch, init_pyramid
from tests.export.sets import make_sets
from tests.volumes import make_volume

GREY = np.random.default_rng(0).integers(1, 255, (4, 48, 40)).astype(np.uint8)
NAMES = ["my data/démo", "100%41 sure", "a#b?c&d", "数据+(1)", "x:y@z"]


def files(folder):
    """List the folders of all files below a folder."""
    return {str(p.parent.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home directory; the working directory is another, which stays empty."""
    for name in ("home", "cwd"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "cwd")
    yield tmp_path / "home"
    assert not list((tmp_path / "cwd").iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_to_a_folder_is_read_from_it(tmp_path, name):
    folder = tmp_path / name
    write_volume(folder / "em", GREY, 2)
    fields = [np.ones((4, 2, *size), np.float32) for size in ((48, 40), (24, 20))]
    make_volume(folder / "field", fields)
    assert {found.partition("/em")[0] for found in files(tmp_path)} >= {name}
    assert {path.name for path in folder.iterdir()} == {"em", "field"}
    for path in (
        folder / "em",
        f"file://{folder}/em",
        f"precomputed://file://{folder}/em",
    ):
        read = Volume(str(path)).read(Grid(0, 0, 0, 48, 40), range(4))
        np.testing.assert_array_equal(read[:, 0], GREY)
    field = Volume(str(folder / "field")).read(Grid(1, 0, 0, 24, 20), range(4))
    assert (field == 1).all()


@pytest.mark.parametrize("name", NAMES[:2])
def test_downloads_and_exports_take_such_folders(tmp_path, name):
    folder = tmp_path / name
    write_volume(folder / "em", GREY, 1)
    words = "--mip 0 --patch_size 32 --z_start 1 --z_end 4 --normalize".split()
    paths = ["--cv_path", str(folder / "em"), "--dst_folder", str(folder / "data")]
    download_image.main([*words, *paths])
    assert (folder / "data/x0_y0_z1_MIP0.h5").is_file()
    make_sets(folder / "sets")
    for dst in (str(folder / "a"), f"file://{folder}/b"):
        main(
            ["export-fields", "--dataset_path", str(folder / "sets"), "--dst_path", dst]
            + ["--warped", f"{dst}-images"]
        )
    names = {"em", "data", "sets", "a", "b", "a-images", "b-images"}
    assert {path.name for path in folder.iterdir() if path.is_dir()} == names
    one, other = (
        CloudVolume(f"file://{folder}/{n}", mip=1, fill_missing=True) for n in "ab"
    )
    np.testing.assert_array_equal(one[:], other[:])


@pytest.mark.parametrize(
    "path", ["file://~/o t/out", "precomputed://file://~/o t/out", "~/o t/out"]
)
def test_an_export_to_the_home_directory_goes_there_whole(home, tmp_path, path):
    make_sets(tmp_path / "sets")
    words = ["--dataset_path", str(tmp_path / "sets"), "--warped", f"{path}-images"]
    for _ in range(2):  # the second finds what the first wrote
        main(["export-fields", *words, "--dst_path", path])
    assert {p.name for p in (home / "o t").iterdir()} == {"out", "out-images"}
    volume = Volume(path)
    assert (volume.read(Grid(1, 64, -32, 40, 56), range(5, 6)) != 0).any()
    main(["export-fields", *words[:2], "--dst_path", f"{path}2", "--like", path])
    assert Volume(f"{path}2").extent() == volume.extent()


@pytest.mark.parametrize(
    "path", ["file://~/out", "precomputed://file://~/out", "~/out"]
)
def test_a_data_set_in_the_home_directory_goes_there_whole(home, tmp_path, path):
    em = make_volume(tmp_path / "em", [GREY[:, None]])
    side = {"x": 20, "y": 20}
    spec = {"image": {"path": em, "src_mip": 0}, "max_mip": 0, "dst_mip": 0}
    spec |= {"x_size": 16, "y_size": 12, "pairs": [[side | {"z": 2}, side | {"z": 1}]]}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    words = ["--spec_path", str(tmp_path / "spec.json"), "--dst_path", path]
    for _ in range(2):
        main(["make-dataset", *words])
    assert (home / "out").is_dir()
    if "://" in path:
        stored = CloudVolume(f"file://{home}/out/image", mip=0)[:]
        assert stored.shape == (16, 12, 2, 1) and (stored != 0).all()


def test_what_is_in_the_home_directory_is_read(home, tmp_path):
    write_volume(home / "em", GREY, 1)
    words = "--mip 0 --patch_size 32 --z_start 1 --z_end 4 --normalize".split()
    words += ["--cv_path", "file://~/em", "--dst_folder", "file://~/data"]
    download_image.main(words)
    assert (home / "data/x0_y0_z1_MIP0.h5").is_file()
    init_pyramid(home / "pyramid", [1])
    fetch("file://~/pyramid", tmp_path / "fetched")
    assert (tmp_path / "fetched/0_mip1in_correlation/create.py").is_file()


@pytest.mark.parametrize(
    "path", ["/my data/em", "/a+b/em", "file:///a b/em", "/em", "/(x)/em", "/a-/em"]
)
def test_a_folder_that_cloud_volume_takes_for_another_is_refused(path):
    with pytest.raises(DatasetError, match="cloud-volume takes it for another path"):
        cloud_path(path)


def test_such_a_folder_is_read_by_the_link_that_the_message_names(tmp_path):
    with pytest.raises(DatasetError) as refused:
        cloud_path("/it's mine/em")
    command = re.search(r"\((ln -s .+) PATH\)", str(refused.value))[1]
    link = tmp_path / "em"
    subprocess.run([*shlex.split(command), str(link)], check=True)
    assert os.readlink(link) == "/it's mine/em"
    assert cloud_path(f"file://{link}") == f"file://{link}"


def test_a_report_links_to_a_volume_of_any_name():
    for path in ("gs://bucket/my data/démo", "zarr3://https://host/a b"):
        expected = path if path.startswith("zarr3") else f"precomputed://{path}"
        assert neuroglancer_source(path) == expected


@pytest.mark.parametrize(
    "words",
    [
        ["init", "gs://b/p", "--mip", "1"],
        ["inspect", "s3://b/d"],
        ["fetch", "gs://b/p", "gs://b/q"],
        ["demo", "--folder", "https://host/demo"],
        ["evaluate", "--pyramid_path", "p", "--dataset_path", "gs://b/d"],
    ],
)
def test_a_flag_of_a_local_folder_takes_no_other_storage(words, capsys):
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args(words)
    assert ended.value.code == 2
    assert "expected a path on this machine" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        download_image.main(
            "--cv_path v --dst_folder gs://b/d --mip 0 --patch_size 8 --z_start 1 "
            "--z_end 2".split()
        )
    assert (
        Path("p") == build_parser().parse_args(["init", "p", "--mip", "1"]).pyramid_path
    )


@pytest.mark.parametrize("flag", ["--dst_path", "--warped"])
def test_a_destination_of_no_known_storage_is_refused_by_name(tmp_path, flag):
    make_sets(tmp_path / "sets")
    paths = {"--dst_path": str(tmp_path / "a")} | {flag: "ftp://host/a"}
    words = [word for pair in paths.items() for word in pair]
    with pytest.raises(DatasetError, match=f"{flag} .*ftp:// is not known"):
        main(["export-fields", "--dataset_path", str(tmp_path / "sets"), *words])
    assert [file.name for file in tmp_path.iterdir()] == ["sets"]


def test_the_formats_are_those_of_cloud_files():
    assert sorted(FORMATS) == sorted(cloudfiles.paths.ALLOWED_FORMATS)


def test_a_scheme_of_cloud_files_alone_and_an_alias_of_the_user_are_taken(monkeypatch):
    check_source("--cv_path", "matrix://bucket/em")
    monkeypatch.setattr(cloudfiles.paths, "ALLOWED_PROTOCOLS", ["file", "mine"])
    check_source("--cv_path", "mine://bucket/em")
    with pytest.raises(DatasetError, match="expected one of file, mine"):
        check_source("--cv_path", "matrix://bucket/em")
