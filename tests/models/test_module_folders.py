"""Pyramids made and copied."""

import json
import os

import pytest
import torch

from metroem.errors import PyramidError, UsageError
from metroem.models.module_folders import fetch, init_pyramid
from metroem.models.requests import PRETRAINED, templates
from metroem.models.weights import checkpoint_path
from metroem.specs.modules import find_modules


def files_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


class TestInit:
    def test_it_writes_a_module_for_each_mip(self, tmp_path):
        made = init_pyramid(tmp_path / "new" / "pyramid", [5, 3])

        names = ["0_mip5in_correlation", "1_mip3in_correlation"]
        assert [path.name for path in made] == names
        modules = find_modules(tmp_path / "new" / "pyramid")
        assert [module.in_mip for module in modules] == [5, 3]
        assert files_below(made[0]) == ["create.py", "model/model_spec.json"]
        assert len((made[0] / "create.py").read_text().splitlines()) < 40

    def test_nothing_is_left_beside_it(self, tmp_path):
        init_pyramid(tmp_path / "pyramid", [5])

        assert os.listdir(tmp_path) == ["pyramid"]

    def test_others_may_read_it(self, tmp_path):
        os.umask(os.umask(0o022))
        init_pyramid(tmp_path / "pyramid", [5])

        wanted = (tmp_path / "ordinary").mkdir() or (tmp_path / "ordinary").stat()
        assert (tmp_path / "pyramid").stat().st_mode == wanted.st_mode

    def test_stages_at_one_mip_are_allowed(self, tmp_path):
        assert len(init_pyramid(tmp_path / "pyramid", [3, 3, 1])) == 3

    def test_an_empty_directory_is_filled(self, tmp_path):
        (tmp_path / "pyramid").mkdir()

        assert init_pyramid(tmp_path / "pyramid", [2])[0].is_dir()

    def test_what_exists_is_never_touched(self, tmp_path):
        (tmp_path / "pyramid").mkdir()
        (tmp_path / "pyramid" / "notes.txt").write_text("mine")

        with pytest.raises(PyramidError, match="exists already"):
            init_pyramid(tmp_path / "pyramid", [2])
        with pytest.raises(PyramidError, match="exists already"):
            init_pyramid(tmp_path / "pyramid" / "notes.txt", [2])

        assert files_below(tmp_path) == ["pyramid/notes.txt"]

    @pytest.mark.parametrize("mips", [[], [3, 5], [2, -1]])
    def test_mips_that_cannot_work_are_refused(self, tmp_path, mips):
        with pytest.raises(UsageError, match="--mip 5 3"):
            init_pyramid(tmp_path / "pyramid", mips)

        assert not (tmp_path / "pyramid").exists()

    def test_an_unknown_template_is_refused_with_those_that_there_are(self, tmp_path):
        with pytest.raises(UsageError, match=r"--template unet.*scalenet"):
            init_pyramid(tmp_path / "pyramid", [2], template="unet")

    def test_pretrained_stages_have_the_weights_of_the_package(self, tmp_path):
        made = init_pyramid(tmp_path / "pyramid", [3, 1, 0], pretrained=True)

        states = [
            torch.load(checkpoint_path(path / "model", "checkpoint"), weights_only=True)
            for path in made
        ]
        first, second, third = (
            torch.cat([value.flatten().float() for value in state.values()])
            for state in states
        )
        assert torch.isfinite(first).all() and torch.isfinite(second).all()
        # The first stage has no prior field, all others have one.
        assert not torch.equal(first, second) and torch.equal(second, third)
        assert "MIP = 3" in (made[0] / "create.py").read_text()

    def test_pretrained_weights_are_of_one_network_and_a_few_mb(self, tmp_path):
        with pytest.raises(UsageError, match=r"--pretrained --template scalenet: the"):
            init_pyramid(tmp_path / "p", [2, 0], "scalenet", pretrained=True)

        assert not (tmp_path / "p").exists()
        files = list(PRETRAINED.iterdir())
        assert sum(path.stat().st_size for path in files) < 5e6

    def test_a_failure_leaves_nothing(self, tmp_path, monkeypatch):
        def fail(folder, mip, template):
            folder.mkdir()
            raise OSError("disk full")

        monkeypatch.setattr("metroem.models.module_folders._write_module", fail)
        with pytest.raises(OSError, match="disk full"):
            init_pyramid(tmp_path / "pyramid", [2])

        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("name", templates())
    def test_a_template_says_of_which_type_it_is(self, tmp_path, name):
        (made,) = init_pyramid(tmp_path / "pyramid", [2], template=name)

        spec = json.loads((made / "model" / "model_spec.json").read_text())
        assert made.name == f"0_mip2in_{name}" and spec["type"] == name

    def test_the_scalenet_has_levels_from_0(self, tmp_path):
        (made,) = init_pyramid(tmp_path / "pyramid", [2], template="scalenet")

        spec = json.loads((made / "model" / "model_spec.json").read_text())
        levels = sorted(map(int, spec["upmodules"]))
        assert levels == list(range(spec["max_level"]))


class TestFetch:
    @pytest.fixture
    def source(self, tmp_path):
        folder = tmp_path / "source"
        for path in init_pyramid(folder, [5, 3]):
            (path / "model" / "best.state.pth.tar").write_bytes(path.name.encode())
        (folder / "best.log").write_text("a log")
        (folder / ".train").mkdir()
        (folder / ".train" / "state.pt").write_bytes(b"state")
        return folder

    @pytest.mark.parametrize("scheme", ["", "file://"])
    def test_a_pyramid_is_copied_without_what_is_no_module(
        self, tmp_path, source, scheme
    ):
        copied = fetch(f"{scheme}{source}", tmp_path / "mine")

        assert copied == [
            tmp_path / "mine" / name
            for name in ("0_mip5in_correlation", "1_mip3in_correlation")
        ]
        assert sorted(os.listdir(tmp_path / "mine")) == [p.name for p in copied]
        for path in copied:
            weights = path / "model" / "best.state.pth.tar"
            assert weights.read_bytes() == path.name.encode()
            assert files_below(path) == files_below(source / path.name)

    def test_one_module_is_copied_under_its_name(self, tmp_path, source):
        copied = fetch(f"{source / '1_mip3in_correlation'}/", tmp_path / "mine")

        assert copied == [tmp_path / "mine" / "1_mip3in_correlation"]
        assert files_below(copied[0]) == files_below(source / "1_mip3in_correlation")

    def test_modules_join_those_that_are_there(self, tmp_path, source):
        for name in ("0_mip5in_correlation", "1_mip3in_correlation"):
            fetch(str(source / name), tmp_path / "mine")

        assert len(find_modules(tmp_path / "mine")) == 2

    def test_what_is_there_is_never_overwritten(self, tmp_path, source):
        fetch(str(source / "1_mip3in_correlation"), tmp_path / "mine")
        weights = tmp_path / "mine" / "1_mip3in_correlation/model/best.state.pth.tar"
        weights.write_bytes(b"trained further")

        with pytest.raises(PyramidError, match="has 1_mip3in_correlation already"):
            fetch(str(source), tmp_path / "mine")

        assert weights.read_bytes() == b"trained further"
        assert os.listdir(tmp_path / "mine") == ["1_mip3in_correlation"]

    def test_a_source_without_modules_is_refused(self, tmp_path):
        (tmp_path / "empty").mkdir()

        with pytest.raises(PyramidError, match="holds no module"):
            fetch(str(tmp_path / "empty"), tmp_path / "mine")

        assert not (tmp_path / "mine").exists()

    def test_a_source_that_is_not_there_is_refused(self, tmp_path):
        with pytest.raises(PyramidError, match="no such directory"):
            fetch(str(tmp_path / "nowhere"), tmp_path / "mine")

    def test_a_module_whose_name_says_nothing_is_refused(self, tmp_path, source):
        (source / "0_mip5in_correlation").rename(source / "my_model")

        with pytest.raises(PyramidError, match=r"my_model.*0_mip8in_rigid"):
            fetch(str(source), tmp_path / "mine")
        with pytest.raises(PyramidError, match=r"my_model.*0_mip8in_rigid"):
            fetch(str(source / "my_model"), tmp_path / "mine")

    @pytest.mark.parametrize("folder", ["..", "{tmp_path}"])
    def test_paths_that_lead_out_of_it_are_refused(self, tmp_path, monkeypatch, folder):
        evil = f"{folder.format(tmp_path=tmp_path)}/evil.py"
        files = [("0_mip5in_a/create.py", b""), (evil, b"")]
        monkeypatch.setattr(
            "metroem.models.module_folders._read_files", lambda source: files
        )

        with pytest.raises(PyramidError, match="evil"):
            fetch("gs://bucket/pyramid", tmp_path / "mine")

        assert os.listdir(tmp_path) == []
