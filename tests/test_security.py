"""Nothing that is read can run code, but for a module that the user named."""

import ast
from pathlib import Path

import h5py
import numpy as np
import pytest

from metroem.errors import DatasetError
from metroem.io.h5 import FieldSet, ImageSet

ROOT = Path(__file__).parents[1]
SOURCES = [
    *(ROOT / "metroem").rglob("*.py"),
    *(ROOT / "benchmarks").glob("*.py"),
    *ROOT.glob("*.py"),
]
FORBIDDEN = {"eval", "exec", "compile", "__import__"}
# Their readers run what a file tells them to, or crash on it.
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "yaml"}


def called(node):
    """The dotted name that a call calls."""
    return ast.unparse(node.func)


def calls():
    for path in sorted(SOURCES):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield path.relative_to(ROOT), node


def test_weights_are_loaded_as_weights_alone():
    loads = [(path, node) for path, node in calls() if called(node) == "torch.load"]

    assert len(loads) >= 2
    for path, node in loads:
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert given.get("weights_only") == "True", f"{path}:{node.lineno}"


def test_arrays_are_loaded_without_pickles():
    for path, node in calls():
        if called(node) in ("np.load", "numpy.load"):
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert given.get("allow_pickle", "False") == "False", path


def test_no_text_is_run_as_code_and_no_shell_is_started():
    for path, node in calls():
        assert called(node) not in FORBIDDEN, f"{path}:{node.lineno}"
        assert called(node) not in ("os.system", "os.popen"), f"{path}:{node.lineno}"
        shell = {k.arg: ast.unparse(k.value) for k in node.keywords}.get("shell")
        assert shell in (None, "False"), f"{path}:{node.lineno}"


def test_nothing_that_unpickles_is_imported():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            roots = {name.split(".")[0] for name in names}
            assert not roots & FORBIDDEN_MODULES, path


class TestH5:
    """A data set from a stranger cannot name files of the machine that reads it."""

    SHAPE = (3, 2, 6, 10)

    @pytest.fixture
    def secret(self, tmp_path):
        values = np.arange(np.prod(self.SHAPE), dtype=np.float32).reshape(self.SHAPE)
        (tmp_path / "elsewhere").mkdir()
        with h5py.File(tmp_path / "elsewhere" / "secret.h5", "w") as file:
            file["img"] = values
        values.tofile(tmp_path / "elsewhere" / "secret.raw")
        return tmp_path / "elsewhere" / "secret.h5"

    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "x0_y0_z1_MIP2.h5"

    def refused(self, path, name=ImageSet):
        with pytest.raises(DatasetError, match=r"lies in other files.*secret"):
            name(path)

    def test_a_link_into_another_file_is_refused(self, path, secret):
        with h5py.File(path, "w") as file:
            file["img"] = h5py.ExternalLink(str(secret), "img")

        self.refused(path)

    def test_a_link_through_a_link_is_refused(self, path, secret):
        with h5py.File(path, "w") as file:
            file["other"] = h5py.ExternalLink(str(secret), "/")
            file["img"] = h5py.SoftLink("/other/img")

        self.refused(path)

    def test_values_in_a_raw_file_are_refused(self, path, secret):
        with h5py.File(path, "w") as file:
            raw = str(secret.with_suffix(".raw"))
            file.create_dataset("img", self.SHAPE, np.float32, external=raw)

        self.refused(path)

    def test_a_virtual_dataset_of_another_file_is_refused(self, path, secret):
        layout = h5py.VirtualLayout(self.SHAPE, np.float32)
        layout[:] = h5py.VirtualSource(str(secret), "img", self.SHAPE)
        with h5py.File(path, "w") as file:
            file.create_virtual_dataset("img", layout)

        self.refused(path)

    @pytest.mark.parametrize("key", ["defects", "box", "offset"])
    def test_what_lies_beside_the_images_is_looked_at_too(self, path, secret, key):
        with h5py.File(path, "w") as file:
            file["img"] = np.ones(self.SHAPE, np.float32)
            file[key] = h5py.ExternalLink(str(secret), "img")

        self.refused(path)

    def test_fields_are_looked_at_too(self, tmp_path, secret):
        path = tmp_path / "field_0_x0_y0_z1_MIP2_a.h5"
        with h5py.File(path, "w") as file:
            file["main"] = h5py.ExternalLink(str(secret), "img")

        self.refused(path, FieldSet)

    def test_a_virtual_dataset_of_the_file_itself_is_read(self, path):
        values = np.arange(np.prod(self.SHAPE), dtype=np.float32).reshape(self.SHAPE)
        with h5py.File(path, "w") as file:
            file["parts"] = values
            layout = h5py.VirtualLayout(self.SHAPE, np.float32)
            layout[:] = h5py.VirtualSource(file["parts"])
            file.create_virtual_dataset("img", layout)

        np.testing.assert_array_equal(ImageSet(path).read(1).tgt, values[1, 1])
