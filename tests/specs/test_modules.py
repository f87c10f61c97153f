import pytest

from metroem.errors import PyramidError
from metroem.specs.modules import ModuleSpec, find_modules, select_stages


def make(folder, *names):
    for name in names:
        (folder / name).mkdir(parents=True)
    return folder


def test_modules_come_in_the_order_of_their_stages(tmp_path):
    names = [f"{stage}_mip{14 - stage}in_net" for stage in range(12)]
    make(tmp_path, *reversed(names), ".train", ".git")
    (tmp_path / "checkpoint.log").touch()
    modules = find_modules(tmp_path)
    assert [m.path.name for m in modules] == names
    assert modules[11] == ModuleSpec(11, 3, "net", tmp_path / names[11])
    assert modules[10].name == names[10]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["old_0_mip8in_x"], "old_0_mip8in_x: not a module directory"),
        (["0_mip8in_"], "not a module directory"),
        (["0_mip8in_a", "notes"], "notes: not a module directory"),
        (["0_mip8in_a", "2_mip5in_b"], "once each"),
        (["0_mip8in_a", "0_mip5in_b"], "once each"),
        (["0_mip5in_a", "1_mip8in_b"], "must not rise"),
        ([], "holds no module directory; expected <STAGE>_mip"),
    ],
)
def test_what_is_no_pyramid_is_refused_by_name(tmp_path, names, message):
    with pytest.raises(PyramidError, match=message):
        find_modules(make(tmp_path, *names))


def test_a_missing_pyramid_says_how_to_make_one(tmp_path):
    with pytest.raises(PyramidError, match="metroem init"):
        find_modules(tmp_path / "nowhere")


def test_stages_are_selected_by_number(tmp_path):
    modules = find_modules(make(tmp_path, "0_mip5in_a", "1_mip5in_b", "2_mip3in_c"))
    assert select_stages(modules, None, "--train_stages") == modules
    assert select_stages(modules, [2, 1], "--train_stages") == modules[1:]
    with pytest.raises(PyramidError, match=r"--train_stages: .*\[3\]"):
        select_stages(modules, [0, 3], "--train_stages")
