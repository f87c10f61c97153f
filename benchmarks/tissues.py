r"""Compare methods on pairs of seven tissues, with known warps; write one page.

Methods are classical ones, the pyramid that comes with metroem, and any others: a
function align(src, tgt) -> field, see `tissues_methods.py`. Cases and what is known of
them are in `tissues_cases.py`. A method whose library is missing is left out, and the
page says so. So is a tissue whose file is missing. Results are kept in
--out/results.json for each tissue and method: the same command resumes, and another one
adds methods or tissues to the page. Methods of --method are always measured again. For
another version of metroem name a new folder; figures of other general weights are
dropped.

Example:
    pip install -r benchmarks/requirements-peers.txt
    python benchmarks/tissues.py --data ../shared/data --out tissues
    python benchmarks/tissues.py --data ../shared/data --out tissues \
        --method mine=my_method.py:align
"""

import argparse
import hashlib
import importlib.util
import json
import logging
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tissues_cases import (
    TISSUES,
    Case,
    Tissue,
    cases_of,
    known_warp_error,
    read_sections,
)
from tissues_methods import PEERS, Method, pyramid_method, untrained_pyramid
from torch import Tensor

from metroem import Pyramid
from metroem.demo import run_steps
from metroem.errors import MetroEMError, UsageError
from metroem.evaluation.metrics import (
    chunked_correlation,
    cycle_error,
    jacobian,
)
from metroem.evaluation.tables import print_json, write_json
from metroem.geometry.field import invert, warp
from metroem.io.pictures import overlay
from metroem.io.volume_write import write_volume
from metroem.models.requests import PRETRAINED
from metroem.utils import cli

logger = logging.getLogger("metroem.benchmarks.tissues")

ROOT = Path(__file__).resolve().parents[1]
OURS = ("untrained", "networks", "pretrained")
TRAINED = ("finetuned", "scratch")  # need --train_minutes
WEIGHTED = ("networks", "pretrained", "finetuned")  # have the general weights
_MIPS = (2, 1, 0)  # as of Pyramid.pretrained

Record = dict[str, float]
Results = dict[str, dict[str, Record]]  # method -> case -> figures


def build_parser() -> argparse.ArgumentParser:
    """Define the flags."""
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of the .npy stacks")
    add("--out", type=Path, required=True, help="folder for results and pyramids")
    names = [tissue.name for tissue in TISSUES]
    add("--tissues", nargs="+", choices=names, default=names, help="which (all)")
    methods = [*PEERS, *OURS, *TRAINED]
    add("--methods", nargs="*", choices=methods, help="which (all)")
    add("--method", nargs="*", default=[], help="NAME=FILE.py:FUNCTION, of your own")
    minutes = "also train on each tissue for so long, from the weights of the package "
    add("--train_minutes", type=float, help=minutes + "and from scratch")
    page = ROOT / "docs" / "benchmark.md"
    add("--page", type=Path, default=page, help="page to write (docs/benchmark.md)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, and write the page; the last line is a JSON object."""
    flags = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    flags.out.mkdir(parents=True, exist_ok=True)
    path = flags.out / "results.json"
    results: Results = json.loads(path.read_text()) if path.is_file() else {}
    drop_figures_of_other_weights(flags.out, results)
    wanted = [
        name for name in (*PEERS, *OURS) if name in (flags.methods or (*PEERS, *OURS))
    ]
    own = [text.partition("=")[0] for text in flags.method]
    for name in own:
        if name.partition(",")[0] in (*PEERS, *OURS, *TRAINED):
            raise UsageError(f"--method {name}: is a method already; name it otherwise")
    if flags.train_minutes is None and set(TRAINED) & set(flags.methods or ()):
        raise UsageError(f"--methods {' '.join(TRAINED)}: expected --train_minutes")
    tissues = [tissue for tissue in TISSUES if tissue.name in flags.tissues]
    for tissue in tissues:
        if tissue.file and not (flags.data / tissue.file).is_file():
            logger.warning("%s: no %s in --data; left out", tissue.name, tissue.file)
            continue
        cases = list(cases_of(tissue, flags.data))
        methods = [*wanted, *own]
        if flags.train_minutes is not None and tissue.train is not None:
            chosen = flags.methods or TRAINED
            took = f"{flags.train_minutes:g} minutes"
            methods += [f"{name}, {took}" for name in TRAINED if name in chosen]
        for name in methods:
            known = results.setdefault(name, {})
            if name not in own and all(case.key in known for case in cases):
                continue
            try:
                method = find_method(name, flags, tissue)
                run_method(method, cases, known)
            except ImportError as error:
                logger.warning("%s: left out, since %s is missing", name, error.name)
                if not known:
                    del results[name]
                continue
            write_json(path, results)
            logger.info("%-10s %-18s %s", tissue.name, name, _in_short(known, tissue))
    save_pictures(flags, tissues, results)
    write_page(flags.page, results)
    print_json({name: len(known) for name, known in results.items()})


def drop_figures_of_other_weights(out: Path, results: Results) -> None:
    """Drop the figures of our methods if the general weights are no longer the same."""
    noted = out / "weights_sha256.txt"
    if noted.is_file() and noted.read_text() != _weights_sha256():
        for name in [name for name in results if name.partition(",")[0] in WEIGHTED]:
            logger.warning("%s: of other general weights; dropped", name)
            del results[name]
        write_json(out / "results.json", results)
    noted.write_text(_weights_sha256())


def _weights_sha256() -> str:
    """Hash the general weights of the package."""
    sha = hashlib.sha256()
    for path in sorted(PRETRAINED.iterdir()):
        sha.update(path.read_bytes())
    return sha.hexdigest()


def find_method(name: str, flags: argparse.Namespace, tissue: Tissue) -> Method:
    """Find or train the method of a name, for a tissue."""
    if name in PEERS:
        return PEERS[name]
    if name == "untrained":
        return pyramid_method(untrained_pyramid())
    if name in ("networks", "pretrained"):
        return pyramid_method(Pyramid.pretrained(), finetune=name == "pretrained")
    if (trained := name.partition(",")[0]) in TRAINED:
        return pyramid_method(train(trained, flags, tissue))
    (where,) = (text for text in flags.method if text.partition("=")[0] == name)
    file, _, function = where.partition("=")[2].rpartition(":")
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not Path(file).is_file():
        raise UsageError(f"--method {where}: expected NAME=FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise UsageError(f"--method {where}: {file} has no function {function}")
    return getattr(module, function)


def train(name: str, flags: argparse.Namespace, tissue: Tissue) -> Pyramid:
    """Train a pyramid on the other sections of a tissue, with metroem's commands."""
    assert tissue.train is not None
    folder = flags.out / "pyramids" / f"{tissue.name}_{flags.train_minutes:g}"
    if name in WEIGHTED:
        folder /= _weights_sha256()[:8]
    pyramid = folder / name
    if not pyramid.exists():
        first, end = tissue.train
        sections = np.maximum(read_sections(tissue, flags.data)[first:end], 1)
        side = min(512, *sections.shape[1:]) >> max(_MIPS) << max(_MIPS)
        if not (folder / "volume").exists():
            write_volume(folder / "volume", sections, max(_MIPS) + 1)
        mips = [str(mip) for mip in _MIPS]
        data = str(folder / f"data_{name}")
        download = ["download-image", "--cv_path", str(folder / "volume")]
        download += ["--dst_folder", data, "--normalize", "--mip", *mips]
        download += ["--patch_size", *(str(side >> mip) for mip in _MIPS)]
        download += ["--z_start", "1", "--z_end", str(len(sections))]
        init = ["init", "--pyramid_path", str(pyramid), "--mip", *mips]
        training = ["train", "--pyramid_path", str(pyramid), "--dataset_path", data]
        training += ["--budget_minutes", f"{flags.train_minutes:g}"]
        before_last = [str(stage) for stage in range(len(_MIPS) - 1)]
        training += ["--generate_field_stages", *before_last]
        if name == "finetuned":
            init += ["--pretrained"]
            training += ["--train_mode", "finetune"]
        run_steps([download, init, training])
    return Pyramid.load(pyramid)


def run_method(method: Method, cases: Sequence[Case], known: dict[str, Record]) -> None:
    """Run a method on the cases of a tissue, and measure its fields."""
    own: dict[int, Tensor] = {}
    for case in cases:
        began = time.monotonic(), time.process_time()
        field = _checked(method(case.src, case.tgt), case)
        figures = {
            "wall_s": time.monotonic() - began[0],
            "cpu_s": time.process_time() - began[1],
        }
        valid = case.valid()
        if case.kind == "neighbours":
            own[case.pair] = field
            back = _checked(method(case.tgt, case.src), case)
            figures["cycle"] = cycle_error(field, back, valid).mean
        src, tgt = (torch.from_numpy(one)[None, None] for one in (case.src, case.tgt))
        shown = warp((src > 0).float(), field) > 0.99
        cpc = chunked_correlation(warp(src, field), tgt, shown & (tgt > 0))
        figures["cpc"] = float(cpc[torch.isfinite(cpc)].mean())
        figures["folds"] = jacobian(field, valid).folds
        if case.truth is not None:
            error = (field - case.truth).norm(dim=1, keepdim=True)[valid]
            figures["epe"] = float(error.mean())
        if case.kind == "warped":
            assert case.warp is not None
            error = known_warp_error(own[case.pair], field, case.warp, valid)
            figures["known"] = float(error.mean())
            if case.near is not None:
                near = torch.from_numpy(case.near.astype(np.float32))[None, None]
                near = (warp(near, invert(case.warp)) > 0.5) & valid
                far = valid & ~near
                for name, where in (("near", near), ("known", far)):
                    error = known_warp_error(own[case.pair], field, case.warp, where)
                    figures[name] = float(error.mean())
        known[case.key] = figures


def _checked(field: np.ndarray, case: Case) -> Tensor:
    """Refuse what is no field of the pair."""
    field = np.asarray(field)
    wanted = (2, *case.tgt.shape)
    if field.shape != wanted or not np.isfinite(field).all():
        raise MetroEMError(
            f"{case.key}: expected a field of {wanted} finite numbers, found "
            f"{field.shape}"
        )
    return torch.from_numpy(field.astype(np.float32))[None]


def mean(results: Results, method: str, tissue: str, kind: str, figure: str) -> float:
    """Mean of a figure over the pairs of a tissue; NaN if there is none."""
    values = [
        record[figure]
        for key, record in results.get(method, {}).items()
        if key.split()[0] == tissue and key.split()[2] == kind and figure in record
    ]
    return float(np.mean(values)) if values else float("nan")


def _in_short(known: dict[str, Record], tissue: Tissue) -> str:
    one = {"": known}
    words = [
        f"{label} {mean(one, '', tissue.name, kind, figure):.2f}"
        for label, kind, figure in (
            ("known warp", "warped", "known"),
            ("epe", "warped", "epe"),
            ("itself", "itself", "epe"),
            ("cpc", "neighbours", "cpc"),
            ("cycle", "neighbours", "cycle"),
            ("seconds", "warped", "cpu_s"),
        )
    ]
    return ", ".join(words)


def save_pictures(
    flags: argparse.Namespace, tissues: Sequence[Tissue], results: Results
) -> None:
    """Draw the first warped pair of each tissue: before, best classical one, ours."""
    folder = flags.page.parent / "pictures"
    for tissue in tissues:
        path = folder / f"benchmark_{tissue.name}.jpg"
        has_file = tissue.file is None or (flags.data / tissue.file).is_file()
        if not has_file or "pretrained" not in results:
            continue
        case = next(c for c in cases_of(tissue, flags.data) if c.kind == "warped")
        best = best_classical(results, tissue.name, "warped", "known")
        methods = [PEERS["not aligned"], pyramid_method(Pyramid.pretrained())]
        if best is not None:
            methods.insert(1, PEERS[best])
        panels = []
        for method in methods:
            try:
                field = torch.from_numpy(method(case.src, case.tgt))[None]
            except ImportError as error:
                logger.warning("%s: not drawn, %s is missing", best, error.name)
                continue
            src = warp(torch.from_numpy(case.src)[None, None], field)[0, 0].numpy()
            panels.append(overlay(src, case.tgt)[96:416, 96:416])
            panels.append(np.full((len(panels[0]), 8, 3), 255, np.uint8))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate(panels[:-1], 1)).save(path, quality=80)


def best_classical(results: Results, tissue: str, kind: str, figure: str) -> str | None:
    """Name the classical method with the lowest figure; None if none was measured."""
    found = {name: mean(results, name, tissue, kind, figure) for name in PEERS}
    found = {name: value for name, value in found.items() if np.isfinite(value)}
    return min(found, key=lambda name: found[name]) if found else None


def write_page(path: Path, results: Results) -> None:
    """Write the page of all results."""
    measured = {key.split()[0] for known in results.values() for key in known}
    tissues = [tissue for tissue in TISSUES if tissue.name in measured]
    names = [tissue.name for tissue in tissues]
    exact = [tissue.name for tissue in tissues if tissue.is_exact]
    twice = [tissue.name for tissue in tissues if tissue.twice is not None]
    folded = [tissue.name for tissue in tissues if tissue.fold is not None]
    lines = [_INTRO.format(machine=machine(), date=time.strftime("%Y-%m-%d"))]
    lines += ["## The known warp, px\n", _KNOWN]
    lines += table(results, [(name, name, "warped", "known") for name in names])
    lines += ["## A section on itself, px\n", _ITSELF]
    lines += table(results, [(name, name, "itself", "epe") for name in names])
    lines += ["## Where the truth between two images is known, px\n", _EXACT]
    columns = [(f"{name}, warped", name, "warped", "epe") for name in exact]
    columns += [(f"{name}, as imaged", name, "neighbours", "epe") for name in exact]
    columns += [(f"{name}, imaged twice", name, "twice", "epe") for name in twice]
    columns += [(f"{name}, near the fold", name, "warped", "near") for name in folded]
    lines += table(results, columns)
    lines += ["## Neighbours as they are\n", _AGREEMENT]
    columns = [(f"CPC, {name}", name, "neighbours", "cpc") for name in names]
    lines += table(results, columns, best=max)
    lines += ["## Cycles, folds and time\n", _COSTS]
    lines += costs(results, names)
    lines += ["## How they look\n", _PICTURES]
    for tissue in tissues:
        picture = path.parent / "pictures" / f"benchmark_{tissue.name}.jpg"
        if picture.is_file():
            lines += [
                f"{tissue.title}:\n",
                f"![{tissue.title}](pictures/{picture.name})\n",
            ]
    lines += ["## The tissues\n", "| name | tissue | source |", "| --- | --- | --- |"]
    lines += [f"| {t.name} | {t.title} | {t.source} |" for t in tissues]
    path.write_text("\n".join(lines) + "\n")
    logger.info("wrote %s", path)


def table(
    results: Results, columns: Sequence[tuple[str, str, str, str]], best: Any = min
) -> list[str]:
    """Make a table of methods; columns are (title, tissue, kind, figure)."""
    values = {
        name: [mean(results, name, *column[1:]) for column in columns]
        for name in _ordered(results)
    }
    bests = []
    for index in range(len(columns)):
        known = [row[index] for row in values.values() if np.isfinite(row[index])]
        bests.append(round(best(known), 2) if known else None)
    lines = ["| method | " + " | ".join(column[0] for column in columns) + " |"]
    lines += ["| --- |" + " ---: |" * len(columns)]
    for name, row in values.items():
        words = []
        for value, top in zip(row, bests, strict=True):
            word = "" if not np.isfinite(value) else f"{value:.2f}"
            words.append(f"**{word}**" if word and round(value, 2) == top else word)
        if any(words):
            lines.append(f"| {_label(name)} | " + " | ".join(words) + " |")
    return [*lines, ""]


def costs(results: Results, names: Sequence[str]) -> list[str]:
    """Make the table of cycle errors, folds and CPU time, means over tissues."""
    lines = ["| method | cycle error, px | folds, ppm | CPU s a pair |"]
    lines += ["| --- | ---: | ---: | ---: |"]
    for name in _ordered(results):
        means = [
            [mean(results, name, tissue, kind, figure) for tissue in names]
            for kind, figure in (
                ("neighbours", "cycle"),
                ("warped", "folds"),
                ("warped", "cpu_s"),
            )
        ]
        if np.isnan(means).any():
            continue
        cycle, folds, seconds = (float(np.mean(one)) for one in means)
        lines.append(
            f"| {_label(name)} | {cycle:.2f} | {folds * 1e6:.0f} | {seconds:.1f} |"
        )
    return [*lines, ""]


def _ordered(results: Results) -> list[str]:
    """Names of the methods: classical ones, ours by minutes of training, others."""
    order = [*PEERS, *OURS, *TRAINED]

    def place(name: str) -> tuple[int, float]:
        first, comma, minutes = name.partition(",")
        if first not in order:
            return len(order), 0.0
        return order.index(first), float(minutes.split()[0]) if comma else 0.0

    return sorted(results, key=place)


def _label(name: str) -> str:
    first, comma, minutes = name.partition(",")
    return _LABELS.get(first, first) + comma + minutes


def machine() -> str:
    """Describe the machine and the versions that matter."""
    return f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"


_LABELS = {
    "untrained": "MetroEM, untrained networks, finetuner",
    "networks": "MetroEM, pretrained, networks alone",
    "pretrained": "MetroEM, pretrained",
    "finetuned": "MetroEM, pretrained, then trained on the tissue",
    "scratch": "MetroEM, trained on the tissue alone",
}
_INTRO = """# Benchmark: seven tissues

How far off are the fields that methods find between two sections? One command measures
all methods on the same pairs, and writes this page:

```sh
python benchmarks/tissues.py --data ../shared/data --out tissues
```

`pip install -r benchmarks/requirements-peers.txt` brings the classical methods. One
whose library is missing is left out.

The stacks are public; the last table says where they come from. `--data` is a folder of
them as .npy, uint8 [section, rows, cols]. A stack that is missing is left out; the
artificial tissue is always there. No network of ours was trained on sections that are
measured here. Three constants of our finetuner were chosen on these pairs.

**Add your method.** It is a function `align(src, tgt)` of two images, (H, W) float32
from 0 to 1, 0 = no data. It returns the field, (2, H, W), pull, px, channel 0 along
cols: `src[p + field(p)]` belongs at `tgt[p]`.

```sh
python benchmarks/tissues.py --data ../shared/data --out tissues \\
    --method mine=my_method.py:align
```

Results of other methods are kept, and the page shows all. With `--train_minutes 10`
pyramids are also trained on other sections of each tissue for so long, from the general
weights and from nothing.

Four pairs of each tissue, windows of 512 px, one thread; {machine}, {date}. The best
value is bold.
"""
_KNOWN = """Src is warped by a known smooth field of up to 24 px with a turn of up to
1.5 degrees, and gets noise and another contrast. The method's own field of the pair
before the warp, composed with the inverse warp, is what it should find. The figure is
the mean distance from that. How the tissue moves between sections does not count, and
no true field between them is needed. Of `zebrafish`, places near the fold are left out.
"""
_ITSELF = """A section, warped like that, on itself: the true field is known exactly.
"""
_EXACT = """FIB-SEM and artificial sections are aligned by the way they were made. So
the field between neighbours is 0, or the inverse of the warp, and "not aligned" is
perfect as imaged. What is left is largely tissue that moves from section to section.
"Imaged twice": one section with the noise of two images. "Near the fold": error of the
known warp within 40 px of a real fold.
"""
_AGREEMENT = """Correlation of aligned neighbours in chunks of 64 px (CPC); higher is
better. A field that follows noise raises it, so read it together with the tables above.
"""
_COSTS = """Means over all tissues, of methods that were run on all. Cycle error: a
pixel of tgt goes to src and back by the field of the swapped pair. Folds: pixels of
warped pairs whose Jacobian determinant is 0 or less.
"""
_PICTURES = """The first warped pair of each tissue, src in red and tgt in cyan. Left:
not aligned. Middle: by the classical method with the lowest error of the known warp.
Right: by the weights that come with MetroEM. What agrees is grey.
"""


if __name__ == "__main__":
    cli.run(main)
