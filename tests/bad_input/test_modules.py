"""Module directories that are nearly right, by the commands that people give."""

import json
import os
import shutil
import signal
import stat
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given

import train as train_script
from metroem.__main__ import main
from metroem.models.build import build_net
from metroem.models.module_folders import init_pyramid
from metroem.models.weights import save_weights
from tests.bad_input.inputs import (
    MOST_SECONDS,
    broken_text,
    encoded,
    ends_well,
    nearly,
    tried,
)
from tests.bad_input.test_files import SEEDS, damaged, nearly_weights
from tests.pairs import write_pairs

pytestmark = pytest.mark.slow

SPEC = {
    "type": "correlation",
    "levels": [
        {"features": 4, "blocks": 1, "radius": [1], "hidden": 4, "dilations": [1]},
        {"features": 4, "blocks": 1, "radius": [1], "hidden": 4, "dilations": [1]},
    ],
}
PHASE = {"lr": 1e-3, "num_epochs": 1, "smoothness": 5, "crop_size": 48}
PHASE["num_samples"] = 2
# Whether a create.py has run: it leaves this beside the data set.
MARK = "import os; open(os.environ['MARK'], 'w').close()\n"
CREATE = MARK + (files("metroem") / "models/templates/create.py").read_text()
CREATES = [
    "",
    "def create(",
    "x = 1\n",
    "create = None\n",
    "def create(): return None\n",
    "def create(**params): return None\n",
    "def create(**params): raise ValueError\n",
    "def create(**params): raise KeyError('\\ud800')\n",
    "raise SystemExit(0)\n",
    "import sys\ndef create(**params): sys.exit()\n",
    "import nothing_of_this_name\n",
    "import torch\ndef create(**params): return torch.nn.Linear(1, 1)\n",
    "import torch\ndef create(**params):\n"
    "    m = torch.nn.Module(); m.aligner = torch.nn.Linear(1, 1); return m\n",
    "class Oops(BaseException): pass\nraise Oops\n",
    "assert False\n",
    "def create(**params): return create(**params)\n",
    "__file__ = None\n",
]
NAMES = [
    "0_mip1in_a b",
    "0_mip1in_a'b\"c",
    "0_mip1in_a\nb",
    "0_mip1in_é✓",
    "0_mip1in_%s{x}[b]*",
    "0_mip1in_-",
    "0_mip1in_a.py",
    "0_mip1in_" + "x" * 200,
    os.fsdecode(b"0_mip1in_\xe9"),
    "1_mip1in_a",
    "0_mip99in_a",
    "0_mip1in_",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two data sets, a short schedule, and a sound pyramid."""
    place = tmp_path_factory.mktemp("place")
    write_pairs(place / "data", mips=(1,), num_pairs=1, shape=(160, 192))
    write_pairs(place / "many", mips=(1,), num_pairs=4, shape=(160, 192))
    (place / "schedule.json").write_text(json.dumps({"1": [PHASE]}))
    (module,) = init_pyramid(place / "sound", [1])
    (module / "model" / "model_spec.json").write_text(json.dumps(SPEC))
    (module / "create.py").write_text(CREATE)
    net = build_net(module / "model" / "model_spec.json", operators="corrected")
    save_weights(net, module / "model" / "checkpoint.state.pth.tar")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MARK", str(place / "mark"))
        shutil.copytree(place / "sound", place / "once")
        train(place / "once")  # imports what is slow, out of the time limit
        yield place


def fresh(place):
    """A copy of the sound pyramid, and nothing left of the one before."""
    shutil.rmtree(place / "pyramid", ignore_errors=True)
    for left in (*place.glob("many/field_*"), place / "mark"):
        left.unlink(missing_ok=True)
    return shutil.copytree(place / "sound", place / "pyramid")


def made(place, drawn, change, chance=None):
    """A copy of the sound pyramid with one thing changed."""
    pyramid = fresh(place)
    (module,) = pyramid.iterdir()
    change(chance, module, drawn)
    return pyramid


def change(chance, module, drawn):
    """Make one thing of a module wrong, or odd."""
    change = chance.choice(
        [other_create, other_create, broken_create, other_spec, other_spec, other_spec]
        + [other_weights, other_kind, other_kind, other_name, other_name]
    )
    change(chance, module, drawn)


def other_create(chance, module, drawn):
    (module / "create.py").write_text(
        MARK + chance.choice(CREATES), errors="surrogatepass"
    )


def broken_create(chance, module, drawn):
    (module / "create.py").write_bytes(drawn["create"])


def other_spec(chance, module, drawn):
    (module / "model" / "model_spec.json").write_bytes(drawn["spec"])
    (module / "model" / "checkpoint.state.pth.tar").unlink()


def other_weights(chance, module, drawn):
    path = module / "model" / "checkpoint.state.pth.tar"
    content = path.read_bytes() if chance.random() < 0.5 else nearly_weights(chance)
    path.write_bytes(damaged(chance, content))


def other_kind(chance, module, drawn):
    """Something that is no file, or no folder, where one is expected."""
    weights = "model/checkpoint.state.pth.tar"
    name = chance.choice(
        ["create.py", "model/model_spec.json", weights, "model", "new"]
    )
    path = module / name
    if path.is_dir():
        path.rename(module / "away")
    path.unlink(missing_ok=True)
    kind = chance.choice(
        ["nothing", "folder", "empty", "loop", "up", "pipe", "nowhere"]
    )
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "nothing":
        to = {"loop": path.name, "up": "..", "nowhere": "nothing/there"}[kind]
        path.symlink_to(to)


def other_name(chance, module, drawn):
    module.rename(module.with_name(chance.choice(NAMES)))


def contents(folder):
    """Every path below a folder, with what it is and holds."""
    found = {}
    for at, folders, plain in os.walk(folder):
        for name in (*folders, *plain):
            path = os.path.join(at, name)
            kind = stat.S_IFMT(os.lstat(path).st_mode)
            held = os.readlink(path) if stat.S_ISLNK(kind) else None
            found[path] = kind, Path(path).read_bytes() if stat.S_ISREG(kind) else held
    return found


@contextmanager
def alarmed(seconds):
    """Raise where something hangs, as opening a pipe does."""

    def stop(*_):
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(int(seconds))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def flags(pyramid, data, *more):
    paths = ["--pyramid_path", pyramid, "--dataset_path", pyramid.parent / data]
    return [str(word) for word in (*paths, *more)]


def inspect(pyramid):
    main(["inspect", str(pyramid.parent / "data"), "--pyramid_path", str(pyramid)])


def evaluate(pyramid):
    main(["evaluate", *flags(pyramid, "data", "--no_finetune")])


def train(pyramid):
    how = ["--device", "cpu", "--no_redirect_stdout", "--val_pairs", 1]
    how += [
        "--train_mode",
        "custom",
        "--train_params_path",
        pyramid.parent / "schedule.json",
    ]
    train_script.main(flags(pyramid, "many", *how))


NEARLY = {
    "chance": SEEDS,
    "spec": nearly(SPEC).map(encoded) | broken_text(json.dumps(SPEC)),
    "create": broken_text(CREATE),
}


def ends(command, place, pyramid):
    """Run a command, which changes nothing that is there; what it added."""
    before = contents(place)
    with alarmed(MOST_SECONDS):
        name = f"modules: {command.__name__}"
        ended = ends_well(name, lambda: command(pyramid))
    after = contents(place)
    for found in (before, after):  # fields that evaluate keeps come and go
        for path in [path for path in found if "/.evaluate" in path]:
            del found[path]
    assert before == {path: after.get(path) for path in before}
    return ended, after.keys() - before.keys() - {str(place / "mark")}


@tried(25)
@given(**NEARLY)
def test_modules_are_inspected_without_running_their_code(place, chance, spec, create):
    pyramid = made(place, {"spec": spec, "create": create}, change, chance)
    _, added = ends(inspect, place, pyramid)
    assert not added and not (place / "mark").exists()


@tried(12)
@given(**NEARLY)
def test_modules_that_are_nearly_right_are_evaluated(place, chance, spec, create):
    pyramid = made(place, {"spec": spec, "create": create}, change, chance)
    _, added = ends(evaluate, place, pyramid)
    assert not added


@tried(6)
@given(**NEARLY)
def test_modules_that_are_nearly_right_are_trained(place, chance, spec, create):
    pyramid = made(place, {"spec": spec, "create": create}, change, chance)
    (module,) = pyramid.iterdir()
    for weights in module.glob("model/checkpoint*"):  # which training replaces
        if weights.is_file():
            weights.unlink()
    ends(train, place, pyramid)


@pytest.mark.parametrize("key", ["features", "hidden", "blocks", "radius"])
def test_a_spec_beyond_measure_takes_no_memory(place, key):
    size = 2**31
    level = SPEC["levels"][0] | {key: [size] if key == "radius" else size}
    drawn = {"spec": json.dumps({**SPEC, "levels": [level]}).encode()}
    assert ends(evaluate, place, made(place, drawn, other_spec))[0] == "refused"


def test_a_sound_module_is_read_by_each_command(place):
    pyramid = fresh(place)
    (weights,) = pyramid.glob("*/model/checkpoint*")
    assert ends(inspect, place, pyramid)[0] == "read"
    assert ends(evaluate, place, pyramid)[0] == "read"
    assert (place / "mark").exists()
    weights.unlink()
    ended, added = ends(train, place, pyramid)
    assert ended == "read" and str(weights) in added
