"""Write down what metroem 0.1.3 computes, for tests to compare with.

Not for the environment of this project. In one of its own:

    python3 -m venv old
    old/bin/pip install torch==2.13.0 numpy scipy scikit-image six h5py tqdm \
        artificery scalenet torchfields cloud-volume connected-components-3d fastremap
    old/bin/pip install --no-deps metroem==0.1.3
    old/bin/python tests/compatibility/make_fixtures.py

The fixtures in the repository were made with torch 2.13.0 on a CPU, 2026-11-24.
"""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

# The original asks for CUDA types even where it has no use for them.
torch.cuda.FloatTensor = torch.FloatTensor

import metroem  # noqa: E402
from metroem import helpers  # noqa: E402
from metroem.aligner import Aligner  # noqa: E402
from metroem.finetuner import optimize_pre_post_ups  # noqa: E402
from metroem.loss import rigidity, unsupervised_loss  # noqa: E402

FOLDER = Path(__file__).parent / "fixtures"
# torchfields and stock networks take square images alone.
SIDE = 40


def texture(*shift: float) -> torch.Tensor:
    """(1, 1, SIDE, SIDE) by formula, displaced by (cols, rows) px; no zeros."""
    rows, cols = torch.meshgrid(
        torch.arange(float(SIDE)) + shift[1],
        torch.arange(float(SIDE)) + shift[0],
        indexing="ij",
    )
    grey = torch.sin(rows / 3) + torch.cos(cols / 4) + torch.sin((rows + cols) / 7)
    return grey[None, None] / 1.2 + 0.01


def waves(size_px: float, rows: int = SIDE, cols: int = SIDE) -> torch.Tensor:
    """(1, 2, rows, cols) smooth field of up to `size_px`."""
    row, col = torch.meshgrid(
        torch.arange(float(rows)), torch.arange(float(cols)), indexing="ij"
    )
    field = torch.stack([torch.sin(row / 9 + col / 13), torch.cos(row / 11 - col / 8)])
    return size_px * field[None]


def convblock(*channels: int) -> dict[str, Any]:
    return {"type": "convblock", "arch_desc": {"fms": list(channels), "k": 3}}


def network() -> dict[str, Any]:
    """Three levels, as published modules have them, with few features."""
    ups, downs = {}, {}
    for level, (before, after) in enumerate([(1, 4), (4, 6), (6, 8)]):
        features = {
            "type": "split_processor",
            "processors": [
                {"fm_range": [0, 1], "module": {"type": "identity"}},
                {"fm_range": [0, before], "module": convblock(before, 4, after - 1)},
            ],
        }
        ups[str(level)] = {
            "type": "fm_range_apply",
            "fm_range": before,
            "module": features,
        }
        downs[str(level)] = {
            "type": "warp_with_input_downmodule",
            "arch_desc": {"inner_module": convblock(2 * after, 8, 2)},
        }
    return {
        "type": "scalenet",
        "max_level": 3,
        "upmodules": ups,
        "downmodules": downs,
        "downlinks": {"all": {"type": "upsample_residuals"}},
        "combiners": {"all": {"type": "rollback_warp", "arch_desc": {"rollback": 0}}},
    }


def aligner_fixture() -> dict[str, Any]:
    """A checkpoint, and the fields and embeddings that it gives."""
    torch.manual_seed(0)
    src, tgt = texture(0, 0), texture(2.0, -1.5)
    src[..., 20:26, 5:30] = 0
    found: dict[str, Any] = {"src": src, "tgt": tgt, "prior": waves(2.0)}
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder, "model_spec.json")
        spec.write_text(json.dumps(network()))
        aligner = Aligner(folder, finetune=False, checkpoint_name="ck")
        with torch.no_grad():
            # Fresh networks move nothing; one of these moves some pixels.
            for name, parameter in aligner.net.named_parameters():
                scale = 2.5 if "level_downmodules" in name else 1.0
                parameter.mul_(scale)
        aligner.net.name = "ck"
        aligner.save_checkpoint(folder)
        weights = torch.load(Path(folder, "ck.state.pth.tar"), weights_only=True)
        found["spec"] = spec.read_text()
        given = {"src_img": src, "tgt_img": tgt}
        aligner = Aligner(folder, True, "ck", finetune=False)
        found["field_no_prior"] = aligner(**given)
        found["field_prior"] = aligner(**given, src_agg_field=found["prior"])
        # Put together from its parts: with pass_field=False the original warps src and
        # hands the prior to the network all the same, so that it counts twice.
        prior = found["prior"].field().from_pixels()
        residual = aligner(src_img=prior(src), tgt_img=tgt).from_pixels()
        found["field_warped_src"] = residual(prior).pixels()
        twice = Aligner(folder, False, "ck", finetune=False)
        found["field_prior_twice"] = twice(**given, src_agg_field=found["prior"])
        _, state = aligner(**given, return_state=True)
        found["state_up_1"] = state["up"]["1"]["output"]
        found["embeddings_0"] = aligner.get_embeddings(src, preserve_zeros=True)
    return found | {f"weights/{name}": value for name, value in weights.items()}


def rule(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "binarization": {"strat": "eq", "value": 0}, **more}


# What each call of the finetuner changes against `finetuner_arguments`.
FINETUNER_CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "production": {"normalize": False, "l2": 0, "crop": 2, "max_bad": 5},
    "softer": {"sm": 1.0, "num_iter": 200, "lr": 0.3},
    "impatient": {"noimpr_period": 3, "max_bad": 4, "lr": 2.0, "num_iter": 150},
    "coarser": {"opt_res_coarsness": 1, "sm": 1.0},
    "decay": {"wd": 1e-3, "sm": 1.0},
    "sgd": {"opt_mode": "sgd", "opt_params": {"momentum": 0.9}, "lr": 20.0, "sm": 1.0},
    "masks": {
        "sm": 5.0,
        "mse_keys_to_apply": {
            "src": [rule("src_zeros"), rule("src_defects")],
            "tgt": [rule("tgt_zeros")],
        },
        "sm_keys_to_apply": {
            "src": [rule("src_zeros", mask_value=1e-5), rule("src_defects")]
        },
    },
    "rings": {
        "sm": 5.0,
        "mse_keys_to_apply": {
            "src": [rule("src_zeros", coarsen_ranges=[[1, 0.0]])],
            "tgt": [rule("tgt_zeros", coarsen_ranges=[[1, 0.0]])],
        },
        "sm_keys_to_apply": {
            "src": [rule("src_defects", coarsen_ranges=[[2, 0.1], [1, 0.5]])]
        },
    },
}


def finetuner_arguments() -> dict[str, Any]:
    src = torch.cat([texture(0, 0), texture(5, 9) * texture(3, 1)], 1)
    tgt = torch.cat([texture(1.5, -1), texture(6.5, 8) * texture(4.5, 0)], 1)
    src_zeros = torch.zeros(1, 1, SIDE, SIDE, dtype=torch.bool)
    tgt_zeros, src_defects = src_zeros.clone(), torch.zeros(1, SIDE, SIDE)
    src_zeros[..., :9, :] = True
    tgt_zeros[..., -12:, 26:] = True
    src_defects[:, 24:30, :35] = 1
    return {
        "src": torch.where(src_zeros, 0.0, src),
        "tgt": torch.where(tgt_zeros, 0.0, tgt),
        "initial_res": waves(0.4),
        "src_defects": src_defects,
        "tgt_defects": torch.zeros(1, SIDE, SIDE),
        "src_zeros": src_zeros,
        "tgt_zeros": tgt_zeros,
    }


def finetuner_fixture() -> dict[str, Any]:
    """For each call the arguments, the field returned, and its loss."""
    tensors = finetuner_arguments()
    found: dict[str, Any] = {**tensors, "cases": json.dumps(FINETUNER_CASES)}
    for name, changed in FINETUNER_CASES.items():
        call = {"sm": 30.0, "lr": 0.1, "num_iter": 100} | changed
        given = {key: value.clone() for key, value in tensors.items()}
        field = optimize_pre_post_ups(**given, **call).detach()
        found[f"field_{name}"] = field
        found[f"loss_{name}"] = final_loss(tensors, call, field)
    return found


def final_loss(
    tensors: dict[str, Any], call: dict[str, Any], field: torch.Tensor
) -> torch.Tensor:
    """What the original minimises, of the field that it returned."""
    bundle = {key: value.clone() for key, value in tensors.items()}
    if call.get("normalize", True):
        for side in ("src", "tgt"):
            mask = ~bundle[f"{side}_zeros"]
            bundle[side] = helpers.normalize(bundle[side], mask=mask, mask_fill=0)
    bundle["pred_res"] = field.field()
    bundle["pred_tgt"] = field.field().from_pixels()(bundle["src"])
    rules = {
        key: call.get(key, {}) for key in ("mse_keys_to_apply", "sm_keys_to_apply")
    }
    loss = unsupervised_loss(call["sm"], use_defect_mask=True, **rules)
    similar_and_smooth = loss(bundle, crop=call.get("crop", 16))["result"]
    return similar_and_smooth + call.get("l2", 1e-4) * (field**2).mean()


def loss_fixture() -> dict[str, Any]:
    """Rigidity of fields, and the loss of a pair whose tissue ends."""
    generator = torch.Generator().manual_seed(1)
    rows, cols = 20, 27
    torn = waves(3.0, rows, cols)
    torn[..., :12, :] += 20  # from pixel to pixel, as at a fold
    torn[..., :, 21:] = 0  # outside of the tissue
    fields = {
        "smooth": waves(3.0, rows, cols),
        "rough": torch.randn(1, 2, rows, cols, generator=generator),
        "torn": torn,
        "nothing": torch.zeros(1, 2, rows, cols),
    }
    found: dict[str, Any] = {}
    for name, field in fields.items():
        found[f"field_{name}"] = field
        found[f"rigidity_{name}"] = rigidity(field)
        found[f"rigidity_{name}_power_1"] = rigidity(field, power=1)
        found[f"rigidity_{name}_diagonal"] = rigidity(field, 2, diagonal_mult=0.5)
    return found | pair_loss_fixture()


def pair_loss_fixture() -> dict[str, Any]:
    src, tgt = texture(0, 0), texture(1, -2)
    src[..., 28:, :] = 0
    tgt[..., :, :8] = 0
    field = waves(1.5)
    field[..., 28:, :] += 4
    bundle = {
        "src": src,
        "tgt": tgt,
        "src_zeros": (src == 0).float(),
        "tgt_zeros": (tgt == 0).float(),
        "pred_res": field.field(),
        "pred_tgt": field.field().from_pixels()(src),
    }
    terms = unsupervised_loss(
        smoothness_factor=7.0,
        use_defect_mask=True,
        mse_keys_to_apply={"src": [rule("src_zeros")], "tgt": [rule("tgt_zeros")]},
        sm_keys_to_apply={"src": [rule("src_zeros", mask_value=1e-5)]},
    )(bundle, crop=5)
    names = {"result": "total", "similarity": "similarity", "smoothness": "smoothness"}
    return {"pair_src": src, "pair_tgt": tgt, "pair_field": field} | {
        f"pair_{ours}": terms[theirs] for theirs, ours in names.items()
    }


def plain(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        return value.detach().as_subclass(torch.Tensor).numpy()
    return np.asarray(value)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    fixtures = {
        "aligner": aligner_fixture(),
        "finetuner": finetuner_fixture(),
        "loss": loss_fixture(),
    }
    for name, arrays in fixtures.items():
        arrays = {key: plain(value) for key, value in arrays.items()}
        assert all(
            math.isfinite(a.sum()) for a in arrays.values() if a.dtype.kind == "f"
        )
        np.savez_compressed(FOLDER / f"{name}.npz", **arrays)


if __name__ == "__main__":
    assert not hasattr(metroem, "Pyramid"), "this is not metroem 0.1.3"
    main()
