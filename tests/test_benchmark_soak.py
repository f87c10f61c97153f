"""The soak runs, on few steps, and sees memory and handles that are kept."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def soak(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import soak

    return soak


def looks(soak, kib_per_step=0.0, handles=0.0):
    return [
        soak.Look(step, int(4e5 + kib_per_step * step), int(30 + handles * step))
        for step in range(0, 2001, 100)
    ]


@pytest.mark.parametrize(
    ("kept", "match"),
    [
        ({"kib_per_step": 0.2}, "memory grows by 200.0 KiB in 1,000 steps"),
        ({"handles": 0.005}, "handles were left open"),
    ],
)
def test_what_is_kept_is_noticed(soak, tmp_path, monkeypatch, kept, match):
    monkeypatch.setattr(soak, "prepare", lambda *_: None)
    monkeypatch.setattr(soak, "watched", lambda *_: looks(soak, **kept))
    request = soak.argparse.Namespace(steps=2000, warm_up=0.2, num_workers=0)
    with pytest.raises(ValueError, match=match):
        soak.run_benchmark(request, tmp_path)


@pytest.mark.slow
@pytest.mark.long
def test_a_short_soak_ends_with_its_figures(soak, tmp_path):
    run = soak.prepare(tmp_path, 600)
    found = soak.watched(run, 0)
    assert found[-1].steps >= 400 and found[-1].handles > 3
    assert found[-1].rss_kib > 100_000
