import pytest

from metroem.errors import UsageError
from metroem.specs.augmentations import (
    Augmentation,
    Crack,
    Defocus,
    Fold,
    Missing,
    Photometric,
    RandomFlip,
    RandomSrcTgtSwap,
    RandomTranspose,
    RandomWarp,
    SkipSection,
    Stain,
)
from metroem.specs.parse_json import parse


def parse_augmentation(spec, where):
    return parse(spec, Augmentation, where)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"type": "random_transpose", "prob": 0}, RandomTranspose(0)),
        ({"type": "random_flip"}, RandomFlip(0.5)),
        ({"type": "random_src_tgt_swap"}, RandomSrcTgtSwap(0.5)),
        ({"type": "skip_section", "prob": 0.3}, SkipSection(0.3)),
        (
            {"type": "photometric", "prob": 1, "contrast": 0, "blur": 2.5},
            Photometric(prob=1, contrast=0, blur=2.5),
        ),
        ({"type": "defocus", "sigma_px": 3}, Defocus(sigma_px=3)),
        ({"type": "fold", "width_px": 20}, Fold(width_px=20)),
        ({"type": "crack", "prob": 0.4}, Crack(0.4)),
        ({"type": "missing", "share": 0.5}, Missing(share=0.5)),
        ({"type": "stain", "radius_px": 9.5}, Stain(radius_px=9.5)),
        (
            {"type": "warp", "min_disp": -4, "max_disp": -4, "difficulty": 0},
            RandomWarp(min_disp=-4, max_disp=-4, difficulty=0),
        ),
    ],
)
def test_an_augmentation_is_read_with_its_values(spec, expected):
    assert parse_augmentation(spec, "mine") == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fold", "expected an object, got 'fold'"),
        ({}, "type must be one of .*'random_flip'.*, got None"),
        ({"type": ["fold"]}, "type must be one of"),
        ({"type": "folds"}, "type must be .*'fold'.*, got 'folds'"),
        (
            {"type": "fold", "width": 3},
            r"unknown key \['width'\]; known are .*width_px",
        ),
        ({"type": "fold", "prob": 1.5}, "prob is 1.5: expected a probability"),
        ({"type": "fold", "prob": "1"}, "prob is '1': expected a probability"),
        ({"type": "fold", "prob": True}, "prob is True: expected a probability"),
        ({"type": "fold", "width_px": 0}, "width_px is 0: expected .* above 0"),
        ({"type": "stain", "radius_px": float("inf")}, "radius_px is inf"),
        ({"type": "missing", "share": 0.6}, "share is 0.6: .* up to 0.5"),
        ({"type": "photometric", "noise": -0.1}, "noise is -0.1: expected .* >= 0"),
        ({"type": "photometric", "gamma": float("nan")}, "gamma is nan"),
        ({"type": "warp", "difficulty": 1.5}, "difficulty is 1.5: .*whole number"),
        ({"type": "warp", "difficulty": -1}, "difficulty is -1: .*whole number"),
        ({"type": "warp", "randomize_d": 1}, "randomize_d is 1: .*true or false"),
        (
            {"type": "warp", "min_disp": 5, "max_disp": 1},
            "min_disp 5 is above max_disp 1",
        ),
    ],
)
def test_a_mistake_is_named_with_its_place(spec, message):
    with pytest.raises(UsageError, match=f"mine: phase 1: {message}"):
        parse_augmentation(spec, "mine: phase 1")
