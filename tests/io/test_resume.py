import numpy as np
import pytest

from metroem.errors import DatasetError
from metroem.io import resume
from metroem.io.resume import ResumeStore, describe_differences, parts_folder

REQUEST = {"mips": (3, 5), "cv_path": "gs://somewhere", "suffix": None}


@pytest.fixture
def store(tmp_path):
    return ResumeStore(parts_folder(tmp_path / "file.h5"), REQUEST)


def test_the_folder_is_hidden_and_named_after_the_file(tmp_path):
    assert parts_folder(tmp_path / "file.h5") == tmp_path / ".file.h5.parts"


def test_a_part_is_found_again_by_the_next_run(store):
    store.put("z10", np.arange(6, dtype=np.uint8).reshape(2, 3))

    again = ResumeStore(store.folder, REQUEST)

    assert again.keys() == ["z10"]
    assert again.has("z10") and not again.has("z11")
    part = again.load("z10")
    assert part.dtype == np.uint8
    np.testing.assert_array_equal(part, [[0, 1, 2], [3, 4, 5]])


def test_parts_of_another_request_are_refused_naming_what_differs(store):
    with pytest.raises(DatasetError, match=r"suffix None \(asked for: 'a'\).*--over"):
        ResumeStore(store.folder, REQUEST | {"suffix": "a"})


def test_a_broken_part_is_dropped(store):
    store.put("a", np.zeros((20, 30)))
    path = store.folder / "a.npy"
    path.write_bytes(path.read_bytes()[:200])

    assert not store.has("a")
    assert not path.exists()
    with pytest.raises(DatasetError, match="missing"):
        store.load("a")


def test_a_part_half_written_is_not_one(store):
    (store.folder / ".a.npy.1-2.tmp").write_bytes(b"half")
    assert store.keys() == []


def test_a_folder_without_a_readable_request_is_refused(store):
    (store.folder / "request.json").write_text("{")
    with pytest.raises(DatasetError, match="delete"):
        ResumeStore(store.folder, REQUEST)


def test_removed_parts_are_gone(store):
    store.put("a", np.zeros(1))
    store.remove()
    assert not store.folder.exists()


def test_a_folder_that_is_being_removed_says_to_the_last_what_it_holds(
    store, monkeypatch
):
    # Else what is left could be taken for parts of the next request.
    class Killed(BaseException):
        pass

    def killed(*args, **kwargs):
        raise Killed

    store.put("a", np.zeros(1))
    (store.folder / ".b.npy.1-2.tmp").write_bytes(b"half")
    with monkeypatch.context() as patched:
        patched.setattr(resume.shutil, "rmtree", killed)
        with pytest.raises(Killed):
            store.remove()
    assert [path.name for path in store.folder.iterdir()] == ["request.json"]


def test_equal_requests_differ_in_nothing():
    assert describe_differences(REQUEST, {**REQUEST, "mips": [3, 5]}) == ""
