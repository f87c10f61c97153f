"""A pyramid in forked processes, as multiprocessing.Pool makes them."""

import multiprocessing

import numpy as np
import torch

from metroem.models.module_folders import init_pyramid
from metroem.pyramid import Pyramid
from tests.models.specs import CORRELATION, write_spec


def aligned(pyramid, pair):
    return pyramid.align(*pair, mip=0, finetune=False)


def test_a_pool_of_forks_aligns_although_the_process_had_threads(tmp_path):
    (module,) = init_pyramid(tmp_path / "p", [0], "correlation")
    write_spec(module / "model", CORRELATION)
    torch.manual_seed(0)
    # Weights of no name: those of a fresh network.
    pyramid = Pyramid.load(tmp_path / "p", checkpoint_name=None)  # type: ignore
    pair = np.random.default_rng(0).integers(1, 255, (2, 128, 144)).astype(np.uint8)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected = aligned(pyramid, pair)  # its threads wait for more from now on
        with multiprocessing.get_context("fork").Pool(1) as pool:
            found = pool.apply_async(aligned, (pyramid, pair)).get(timeout=60)
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_allclose(found, expected, atol=1e-4)
