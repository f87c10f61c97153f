"""The pages of docs/: what they tell people to type, and what they say of the code."""

import ast
import json
import os
import re
import subprocess
import sys

import h5py
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import metroem
import train
from metroem import __main__ as metroem_main
from metroem.aligner import Aligner
from metroem.demo import make_sections
from metroem.io.image_volume import ImageVolume
from metroem.io.volume_write import write_volume
from metroem.models.load import load_module
from metroem.models.options import AlignerOptions
from metroem.specs.losses import PARAMS
from metroem.specs.schedule import parse_mask_rules, parse_schedule
from metroem.synthetic.requests import DemoRequest
from metroem.training.step import StepMetrics
from metroem.utils import cli
from tests.commands import (
    CORGIE,
    PAGES,
    README,
    ROOT,
    SCRIPTS,
    blocks,
    check_spelling,
    commands,
    make_targets,
    run,
    short_schedule,
)
from tests.image_sets import one_mask, write_fields, write_images
from tests.pairs import texture, write_pairs

DOCS = ROOT / "docs"
TUTORIAL = PAGES["tutorial"]
COMMANDS = [words for page in PAGES.values() for words in commands(page)]
OURS = [words for words in COMMANDS if words[0] in ("metroem", "python", "torchrun")]
OF_TORCHRUN = ("--nproc_per_node", "--nnodes", "--max_restarts", "--rdzv_backend")
OF_TORCHRUN += ("--rdzv_endpoint", "--rdzv_id", "--rdzv_conf")
OF_OTHERS = ("--logdir", "--no-deps")  # tensorboard, pip
OF_OTHERS += ("--cases", "--alien", "--write")  # the benchmark of stacks
OF_OTHERS += ("--array", "--cpus-per-task", "--mem", "--parsable", "--dependency")
OF_OTHERS += ("--queue-name", "--attributes")  # SLURM above, aws
MAX_COLUMNS = 96  # of code; pages are as wide (docs/_static/wide.css)
OF_CORGIE = [words for words in COMMANDS if words[0] == CORGIE]


def smaller(words, folder):
    """A command on a volume in `folder`, with a smaller patch."""
    words = [w.replace("gs://my-bucket", str(folder)) for w in words]
    words = [{"112": "32"}.get(w, w) for w in words]
    # corgie wants whole chunks of the volume, 128 px here.
    return [w.replace("448", "128").replace("512", "256") for w in words]


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory):
    """A folder with the demo's sections, in which the tutorial was followed."""
    folder = tmp_path_factory.mktemp("tutorial")
    request = DemoRequest(
        folder, num_sections=14, rows=256, cols=224, num_held_out=3, seed=1
    )
    images = np.stack([section.image for section in make_sections(request)])
    write_volume(folder / "em", images, 3)
    (folder / "schedule.json").write_text(short_schedule())
    before = os.getcwd()
    os.chdir(folder)
    try:
        for words in commands(TUTORIAL):
            if words[0] in ("metroem", "python"):
                run(smaller(words, folder))
    finally:
        os.chdir(before)
    return folder


@pytest.mark.slow
def test_the_tutorial_ends_with_weights_a_report_and_fields(tutorial):
    assert len(list(tutorial.glob("pyramid/*/model/checkpoint.state.pth.tar"))) == 2
    assert "<html" in (tutorial / "report.html").read_text()
    assert (tutorial / "fields" / "info").is_file()
    assert list(tutorial.glob("looks/*/info")) and list(tutorial.glob("sofima/*.npy"))


@pytest.mark.slow
@pytest.mark.long  # CI runs those of volumes.md: tests/clients/test_corgie.py
@pytest.mark.skipif(
    not (ROOT / CORGIE).is_file(), reason="no corgie: make clients installs it"
)
def test_corgie_runs_as_the_tutorial_has_it(tutorial):
    for words in commands(TUTORIAL):
        if words[0] == CORGIE:
            arguments = smaller(words, f"file://{tutorial}")[1:]
            done = subprocess.run(
                [str(ROOT / CORGIE), *arguments],
                cwd=tutorial,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    for volume in ("field", "rendered/img/img_rendered", "aligned/img/img_block"):
        assert (tutorial / volume / "info").is_file()


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_each_command_is_spelled_as_its_parser_has_it(words):
    check_spelling(words)


@pytest.mark.parametrize("words", OF_CORGIE, ids=lambda words: words[1])
def test_what_corgie_is_given_names_our_modules_and_options(words):
    flags = [word for word in words if word.startswith("--")]
    specs = [w for f, w in zip(words, words[1:], strict=False) if f.endswith("_spec")]
    assert len(specs) == sum(flag.endswith("_spec") for flag in flags)
    known = set(AlignerOptions.__dataclass_fields__) | {"path", "checkpoint_name"}
    for spec in map(json.loads, specs):
        if "ApplyModel" in spec:
            params = spec["ApplyModel"]["params"]
            assert set(params) <= known
            assert params["path"].startswith("pyramid/")
        else:
            assert spec["path"].startswith("gs://my-bucket/")


def test_every_command_of_the_pages_is_one_that_is_checked():
    programs = {words[0] for words in COMMANDS}
    assert programs <= {"metroem", "python", "torchrun", "make", CORGIE}


def test_the_make_targets_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    for page in PAGES.values():
        named = set(re.findall(r"`make (\w+)`", page)) | make_targets(page)
        assert named <= set(targets)


def test_flags_that_pages_mention_exist():
    parsers = [script.build_parser() for script in SCRIPTS.values()]
    parsers += [metroem_main.build_parser()]
    parsers += [cli.parser("", one) for one, *_ in metroem_main.COMMANDS.values()]
    known = {flag for one in parsers for flag in one._option_string_actions}
    known |= {word for words in OF_CORGIE for word in words} | {*OF_TORCHRUN}
    known |= {*OF_OTHERS}
    for path in ROOT.glob("benchmarks/*.py"):
        known |= set(re.findall(r"(--[a-z]\w+)", path.read_text()))
    for name, page in PAGES.items():
        for flag in set(re.findall(r"(?<!-)--[a-z][\w-]+", page)):
            assert flag in known, f"{name}: {flag}"


def test_no_line_of_code_is_wider_than_the_pages():
    for name, page in {"README": README, **PAGES}.items():
        code = re.findall(r"^```(?:sh|bash|json|python)\n(.*?)^```", page, re.S | re.M)
        for line in "".join(code).splitlines():
            assert len(line) <= MAX_COLUMNS, f"{name}: {line}"


def test_the_place_that_the_link_states_is_where_the_tutorial_downloads():
    names = {}
    exec(blocks(TUTORIAL, "python")[0], names)
    assert names["source"] == "gs://my-bucket/em"
    x, y, z = names["x_nm"] / 8, names["y_nm"] / 8, names["z_nm"] / 40
    words = commands(TUTORIAL)[0]
    flags = {f: int(v) for f, v in zip(words, words[1:], strict=False) if v.isdigit()}
    half = 448 // 2
    assert (int(x) - half, int(y) - half) == (flags["--x_offset"], flags["--y_offset"])
    assert flags["--z_start"] <= int(z) < flags["--z_end"]


def test_the_examples_of_fields_are_true():
    exec("\n".join(blocks(PAGES["fields"], "python")), {})


def test_sections_become_a_volume_as_the_page_on_stacks_has_it(tmp_path, monkeypatch):
    sections = np.random.default_rng(0).integers(1, 255, (3, 40, 72), np.uint8)
    np.save(tmp_path / "sections.npy", sections)
    monkeypatch.chdir(tmp_path)
    (example,) = blocks(PAGES["stack"], "python")
    exec(example, {})
    volume = ImageVolume("em")
    area, held = volume.extent()
    assert volume.mips == [0, 1, 2, 3] and volume.resolution == (24, 24, 30)
    # cols of the array are x, which a volume has first.
    stored = volume.read(area, held)[:, 0]
    np.testing.assert_array_equal(stored, sections.swapaxes(1, 2))


def test_the_commands_of_the_page_on_import_work_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sections = np.random.default_rng(0).integers(1, 255, (3, 300, 360), np.uint8)
    (tmp_path / "sections").mkdir()
    for z, section in enumerate(sections, start=2):
        Image.fromarray(section).save(tmp_path / "sections" / f"s_{z}.png")
    deep = sections.astype(np.uint16) * 300
    tifffile.imwrite(tmp_path / "stack16.tif", deep, photometric="minisblack")
    write_volume(tmp_path / "em_without_mips", sections, 1)
    found = commands(PAGES["import"])
    for words in found:
        run(words)
    assert len(found) == 5
    assert ImageVolume("em").mips == [0, 1, 2]
    assert ImageVolume("em16").info["metroem"]["grey_range"] == [500, 42000]
    assert ImageVolume("em_without_mips").mips == [0, 1, 2, 3]
    for z, section in enumerate(sections, start=2):
        image = np.asarray(Image.open(tmp_path / "images" / f"z000{z}.png"))
        np.testing.assert_array_equal(image, section)
    assert tifffile.imread(tmp_path / "part" / "z0003.tif").shape == (100, 100)


def test_the_schedules_of_the_pages_are_read():
    examples = blocks(PAGES["schedules"], "json")
    parse_schedule(json.loads(examples[0]), "schedules.md")
    parse_mask_rules(json.loads(examples[1]), "schedules.md")


def test_the_tables_of_keys_have_every_key(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    key_tables = pytest.importorskip("key_tables", reason="needs docutils, sphinx")
    named = re.findall(r"^```\{keys\} (\S+)", PAGES["schedules"], re.M)
    assert len(named) == 4
    for path in named:
        kinds = key_tables.named(path)
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            rows = key_tables.table(kind).splitlines()[2:]
            assert len(rows) == len(kind.__struct_fields__)
            assert all(row.count(" | ") == 2 and "None" not in row for row in rows)
    losses = key_tables.table(key_tables.named("metroem.specs.losses.LossSpec"))
    assert all(f'"{kind}"' in losses for kind in PARAMS)


def test_the_page_of_files_names_all_that_files_hold(tmp_path):
    images, fields = "x0_y0_z1_MIP1.h5", "field_0_x0_y0_z1_MIP1_ck.h5"
    mask = one_mask(slice(3, 9), slice(2, 7))
    pairs = [(mask, mask)] * 8
    frames = write_images(tmp_path, images, defects=pairs)
    write_fields(tmp_path, fields, frames)
    write_fields(tmp_path, "field_1_x0_y0_z1_MIP1_ck.h5", frames, num_sides=2)
    found = set()
    for path in tmp_path.glob("*.h5"):
        with h5py.File(path) as file:
            found |= set(file) | set(file.attrs)
    assert len(found) > 15
    for name in found | set(StepMetrics._fields):
        assert f"`{name}`" in PAGES["files"], name


def texts_of_the_code():
    """All text in the package, what is filled in left out as a line of its own."""
    texts = []
    for path in (ROOT / "metroem").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (
                    p.value if isinstance(p, ast.Constant) else "\n"
                    for p in node.values
                )
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"%[-.\d]*[a-z]", "\n", node.value))
    return texts


def test_quoted_messages_are_those_of_the_program():
    texts = texts_of_the_code()
    quoted = "".join(blocks(PAGES["troubleshooting"], "text")).splitlines()
    assert len(quoted) > 15
    for line in quoted:
        # By clauses, since some of them are filled in.
        for clause in filter(None, map(str.strip, re.split("…|; ", line))):
            assert any(clause in text for text in texts), clause


@pytest.fixture
def own_module(tmp_path):
    """The module of the page on networks, in a pyramid with pairs."""
    page = PAGES["networks"]
    module = tmp_path / "pyramid" / "0_mip1in_tiny"
    (module / "model").mkdir(parents=True)
    (module / "create.py").write_text(blocks(page, "python")[0])
    spec, schedule = blocks(page, "json")
    (module / "model" / "model_spec.json").write_text(spec)
    (tmp_path / "schedule.json").write_text(schedule)
    write_pairs(tmp_path / "data", mips=(1,), num_pairs=4, shape=(160, 224))
    return module


def test_the_network_of_the_page_is_trained_a_step_and_aligns(own_module, tmp_path):
    train.main(
        [
            *("--pyramid_path", str(tmp_path / "pyramid")),
            *("--dataset_path", str(tmp_path / "data"), "--device", "cpu"),
            *("--train_mode", "custom", "--val_pairs", "0", "--max_epochs", "1"),
            *("--train_params_path", str(tmp_path / "schedule.json")),
        ]
    )

    folder = tmp_path / "pyramid" / ".train" / "checkpoint"
    (line,) = (folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["training"]["before"] is not None
    pyramid = metroem.Pyramid.load(tmp_path / "pyramid")
    src, tgt = (texture(160, 224, seed)[0, 0].numpy() for seed in (0, 1))
    for finetune in (True, False):
        field = pyramid.align(src, tgt, mip=0, finetune=finetune)
        assert field.shape == (2, 160, 224) and np.isfinite(field).all()


def test_the_network_of_the_page_offers_what_the_page_asks_for(own_module):
    aligner: Aligner = load_module(own_module).aligner
    pair = torch.rand(1, 1, 50, 70), torch.rand(1, 1, 50, 70)
    prior = torch.full((1, 2, 50, 70), 2.0)

    passed = aligner.predict(*pair, prior, levels=(1,))
    aligner.pass_field = False
    warped = aligner.predict(*pair, prior, levels=(1,))

    assert passed.embeddings[1].src.shape == (1, 8, 25, 35)
    # Neither has src warped in its embeddings.
    torch.testing.assert_close(passed.embeddings, warped.embeddings)
    assert passed.field.shape == warped.field.shape == (1, 2, 50, 70)


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path):
    for needed in ("sphinx", "myst_parser", "furo", "sphinx_copybutton"):
        pytest.importorskip(needed, reason="requirements-dev.txt has it")
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "-q", "-b", "html"]
    done = subprocess.run(
        [*command, str(DOCS), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "random_transpose" in (tmp_path / "schedules.html").read_text()
    built = {path.stem for path in tmp_path.glob("*.html")}
    assert set(PAGES) <= built
