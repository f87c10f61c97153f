"""What people and programs hand to `Pyramid` and `Aligner`: it works, or has a line."""

import h5py
import numpy as np
import pytest
import torch

import download_image
from metroem import Pyramid
from metroem.errors import FieldError, MetroEMError, UsageError
from metroem.finetuner import optimize_pre_post_ups
from metroem.geometry.field import fill_not_finite
from metroem.io.h5 import ImageSet, find_image_sets
from metroem.models.module_folders import init_pyramid
from tests.image_sets import write_images
from tests.pairs import shifted_pair
from tests.test_aligner import make_aligner
from tests.volumes import make_volume

ROWS, COLS = 24, 40


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory):
    path = tmp_path_factory.mktemp("boundary") / "pyramid"
    torch.manual_seed(0)
    init_pyramid(path, [1, 0])
    return Pyramid.load(path, checkpoint_name=None)


@pytest.fixture(scope="module")
def pair():
    """uint8 src and tgt."""
    return [i[0, 0].round().byte().numpy() for i in shifted_pair(ROWS, COLS, seed=2)]


def reversed_strides(image):
    return np.ascontiguousarray(image[::-1, ::-1])[::-1, ::-1]


def read_only(image):
    image = image.copy()
    image.setflags(write=False)
    return image


def pillow(mode):
    pil = pytest.importorskip("PIL.Image")
    return lambda image: pil.fromarray(image).convert(mode)


FORMS = {
    **{
        name: lambda image, name=name: image.astype(name)
        for name in ("i1 u2 >u2 <i2 >i4 i8 u4 >u8 f2 >f4 f8 >f8 g".split())
    },
    "list": lambda image: image.tolist(),
    "list of numpy integers": lambda image: [list(row) for row in image],
    "tensor": torch.from_numpy,
    "bfloat16": lambda image: torch.from_numpy(image).bfloat16(),
    "tensor with gradients": lambda image: torch.tensor(
        image, dtype=torch.float32, requires_grad=True
    ),
    "masked, nothing is": np.ma.asarray,
    "read-only": read_only,
    "read-only float32": lambda image: read_only(image.astype(np.float32)),
    "negative strides": reversed_strides,
    "every other column": lambda image: np.repeat(image, 2, axis=1)[:, ::2],
    "columns first": np.asfortranarray,
    "PIL L": lambda image: pillow("L")(image),
    "PIL I": lambda image: pillow("I")(image),
    "PIL F": lambda image: pillow("F")(image),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", FORMS)
def test_images_of_every_kind_of_number_and_layout_give_one_field(pyramid, pair, form):
    pair = [image // 2 for image in pair]  # int8 holds up to 127, bfloat16 to 256
    expected = pyramid.align(*pair, finetune=False)
    given = [FORMS[form](image) for image in pair]
    found = pyramid.align(*given, finetune=False)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_grey_levels_that_float32_does_not_tell_apart_are_told_apart(pyramid, pair):
    expected = pyramid.align(*(image.astype(float) for image in pair), finetune=False)
    far = [image.astype(np.uint32) + 4_000_000_000 for image in pair]
    found = pyramid.align(*far, finetune=False)
    np.testing.assert_allclose(found, expected, atol=1e-3)


BROKEN = [np.nan, np.inf, -np.inf, 1e300]


@pytest.mark.parametrize(
    ("value", "finetune"), [(value, False) for value in BROKEN] + [(np.nan, True)]
)
def test_what_is_not_finite_in_an_array_is_no_data(pyramid, pair, value, finetune):
    src, tgt = (image.astype(float) for image in pair)
    src[20:22, 30] = tgt[7, 9] = value
    found = pyramid.fields(src, tgt, finetune=finetune)
    src[20:22, 30] = tgt[7, 9] = 0
    expected = pyramid.fields(src, tgt, finetune=finetune)
    np.testing.assert_array_equal(found, expected)
    assert np.isnan(src).sum() == 0 and np.isfinite(found).all()


def test_what_is_masked_in_an_array_is_no_data(pyramid, pair):
    src, tgt = pair
    mask = np.zeros(src.shape, bool)
    mask[10:15, 15:30] = True
    found = pyramid.align(np.ma.array(src, mask=mask), tgt, finetune=False)
    expected = pyramid.align(np.where(mask, 0, src), tgt, finetune=False)
    np.testing.assert_array_equal(found, expected)
    assert (found != pyramid.align(src, tgt, finetune=False)).any()


def test_arrays_are_not_written_into(pyramid, pair):
    given = [image.astype(np.float32) for image in pair]
    given[0][3, 4] = np.nan
    before = [image.copy() for image in given]
    pyramid.align(*given, finetune=False)
    np.testing.assert_array_equal(given, before)


@pytest.mark.parametrize("mip", [np.int64(0), np.uint8(0), np.array(0)])
def test_a_mip_may_be_an_integer_of_numpy(pyramid, pair, mip):
    np.testing.assert_array_equal(
        pyramid.align(*pair, mip=mip, finetune=False),
        pyramid.align(*pair, finetune=False),
    )


def palette(image):
    return pillow("P")(image)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda image: image > 9, "src: is bool, which are not grey levels"),
        (lambda image: image * 1j, "src: is complex128"),
        (lambda image: image.astype(str), "src: is <U3"),
        (lambda image: image.astype(object), "src: is object"),
        (lambda image: [[1, 2], [3]], "src: cannot be made an array"),
        (lambda image: palette(image), r"src: a PIL image of mode P .*convert\('L'\)"),
        (
            lambda image: image[..., None],
            r"src \(24, 40, 1\) and tgt \(24, 40\): expec",
        ),
        (lambda image: image[0], r"src \(40,\) and tgt"),
        (lambda image: image[:, :-1], r"src \(24, 39\) and tgt \(24, 40\)"),
        (lambda image: None, "src: is object"),
    ],
)
def test_what_is_no_image_has_its_line(pyramid, pair, change, match):
    src, tgt = pair
    with pytest.raises(UsageError, match=match):
        pyramid.align(change(src), tgt)


def test_images_without_pixels_have_their_line(pyramid):
    with pytest.raises(UsageError, match=r"src \(0, 5\).*with pixels"):
        pyramid.align(np.zeros((0, 5)), np.zeros((0, 5)))


@pytest.mark.parametrize("mip", [0.5, "0", None, -1])
def test_a_mip_that_is_none_has_its_line(pyramid, pair, mip):
    with pytest.raises(UsageError, match=f"mip {mip!r}: expected"):
        pyramid.align(*pair, mip=mip)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (9, 70)])
def test_the_smallest_images_have_a_field(pyramid, shape):
    image = np.random.default_rng(0).integers(1, 255, shape)
    field = pyramid.align(image, image)
    assert field.shape == (2, *shape) and np.isfinite(field).all()


@pytest.fixture
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def modules(folder, operators):
    """Two aligners of the same weights, made as torch is set now."""
    aligner = make_aligner(folder, operators=operators, finetune=True, finetune_iter=30)
    aligner.save_checkpoint(folder)
    return aligner, make_aligner(folder, operators=operators, finetune_iter=30)


@pytest.mark.parametrize("operators", ["corrected", "stock"])
def test_a_default_of_float64_changes_nothing(tmp_path, operators, float64_by_default):
    pair = [image.float() for image in shifted_pair(32, 32, seed=1)]
    one, other = modules(tmp_path, operators)
    found = one(src_img=pair[0], tgt_img=pair[1], finetune=True)
    assert torch.get_default_dtype() == torch.float64
    torch.set_default_dtype(torch.float32)
    expected = other(src_img=pair[0], tgt_img=pair[1], finetune=True)
    assert found.dtype == torch.float32
    # Thirty steps of the finetuner round elsewhere: 8e-6 of 40 px.
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_pyramid_aligns_with_a_default_of_float64(pyramid, pair, float64_by_default):
    found = pyramid.align(*pair)
    torch.set_default_dtype(torch.float32)
    np.testing.assert_array_equal(found, pyramid.align(*pair))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_pyramid_aligns_where_no_gradients_are_recorded(pyramid, pair, mode):
    with mode():
        found = pyramid.align(*pair)
        assert not torch.is_grad_enabled()
    np.testing.assert_array_equal(found, pyramid.align(*pair))


def test_a_pyramid_loaded_in_inference_mode_aligns(tmp_path, pair):
    init_pyramid(tmp_path / "p", [0])
    with torch.inference_mode():
        pyramid = Pyramid.load(tmp_path / "p", checkpoint_name=None)
        assert np.isfinite(pyramid.align(*pair)).all()


@pytest.mark.parametrize("operators", ["corrected", "stock"])
def test_a_module_aligns_in_inference_mode(tmp_path, operators):
    aligner = modules(tmp_path, operators)[0]
    expected = aligner(*shifted_pair(32, 48, seed=1), torch.ones(1, 2, 32, 48))
    with torch.inference_mode():
        pair, prior = shifted_pair(32, 48, seed=1), torch.ones(1, 2, 32, 48)
        assert torch.equal(aligner(*pair, prior), expected)
        assert torch.equal(
            aligner.align(*pair, prior), aligner.align(*pair, torch.ones(1, 2, 32, 48))
        )


def test_the_original_finetuner_works_in_inference_mode():
    with torch.inference_mode():
        features = torch.rand(1, 3, 24, 32)
        zeros = torch.zeros(1, 1, 24, 32)
        field = optimize_pre_post_ups(
            *(features, features, torch.zeros(1, 2, 24, 32), 10.0, 0.1, 5),
            *(zeros, zeros, zeros, zeros),
        )
    assert field.shape == (1, 2, 24, 32)


@pytest.fixture
def aligner(tmp_path):
    return make_aligner(tmp_path, operators="corrected")


def grey():
    return shifted_pair(32, 48, seed=3)


@pytest.mark.parametrize("normalize", [False, True, "raw"])
@pytest.mark.parametrize("value", BROKEN[:3])
def test_what_is_not_finite_in_a_tensor_is_no_data(aligner, value, normalize):
    src, tgt = grey()
    broken, blank = src.clone(), src.clone()
    broken[..., 5, 6:8], blank[..., 5, 6:8] = value, 0
    found = aligner(src_img=broken, tgt_img=tgt, normalize=normalize, finetune=True)
    expected = aligner(src_img=blank, tgt_img=tgt, normalize=normalize, finetune=True)
    assert torch.equal(found, expected) and torch.isfinite(found).all()


def test_a_pair_whose_side_is_nowhere_finite_is_blank(aligner):
    src, tgt = grey()
    prior = torch.full((1, 2, 32, 48), 2.0)
    field = aligner.align(torch.full_like(src, torch.nan), tgt, prior)
    assert torch.equal(field, prior)


@pytest.mark.parametrize("way", ["align", "both ways", "features"])
def test_tensors_of_every_call_may_have_pixels_that_are_not_finite(aligner, way):
    src, tgt = grey()
    broken, blank = src.clone(), src.clone()
    broken[..., 5, 6], blank[..., 5, 6] = torch.nan, 0
    call = {
        "align": aligner.align,
        "both ways": lambda *pair: torch.cat(aligner.align_both_ways(*pair)),
        "features": lambda src, _: aligner.get_embeddings(src, preserve_zeros=True),
    }[way]
    assert torch.equal(call(broken, tgt), call(blank, tgt))


def test_vectors_of_a_prior_that_are_not_finite_are_the_nearest_that_are(aligner):
    src, tgt = grey()
    prior = torch.arange(48.0).expand(1, 2, 32, 48).clone() / 48
    filled = prior.clone()
    prior[..., 40:] = torch.nan
    filled[..., 40:] = filled[..., 39:40]
    assert torch.equal(fill_not_finite(prior), filled)
    assert torch.equal(aligner(src, tgt, prior), aligner(src, tgt, filled))
    assert not fill_not_finite(torch.full((1, 2, 3, 4), torch.inf)).any()


def test_a_module_takes_arrays_too(aligner):
    src, tgt = (image.round() for image in grey())
    given = [image[0, 0].numpy().astype(">u2") for image in (src, tgt)]
    found = aligner(src_img=given[0], tgt_img=given[1].tolist(), normalize="raw")
    expected = aligner(src_img=src, tgt_img=tgt, normalize="raw")
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "dtype", [torch.uint16, torch.uint32, torch.int64, torch.float16, torch.float64]
)
def test_a_module_takes_tensors_of_any_number(aligner, dtype):
    src, tgt = (image.round() for image in grey())
    found = aligner(src_img=src.to(dtype), tgt_img=tgt.to(dtype), normalize=True)
    expected = aligner(src_img=src, tgt_img=tgt, normalize=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"src_img": torch.ones(32, 47)}, UsageError, "src_img .* of the same shape"),
        ({"tgt_img": torch.ones(3, 32, 48)}, UsageError, "tgt_img .* one channel"),
        (
            {"src_img": torch.ones(1, 1, 1, 32, 48)},
            UsageError,
            "src_img .* one channel",
        ),
        ({"src_img": torch.ones(0, 48)}, UsageError, "src_img .* with pixels"),
        ({"src_img": torch.ones(32, 48) > 0}, UsageError, "src_img: is torch.bool"),
        ({"src_agg_field": torch.ones(1, 2, 16, 48)}, FieldError, "src_agg_field"),
        ({"src_agg_field": torch.ones(1, 3, 32, 48)}, FieldError, "src_agg_field"),
        ({"tgt_defects": torch.ones(32, 47)}, UsageError, "tgt_defects .* a mask of"),
    ],
)
def test_what_a_module_cannot_take_has_its_line(aligner, given, error, match):
    src, tgt = grey()
    with pytest.raises(error, match=match):
        aligner(**{"src_img": src, "tgt_img": tgt} | given)
    assert issubclass(error, MetroEMError)


def test_what_is_not_finite_in_a_data_set_is_no_data(tmp_path):
    write_images(tmp_path, "x0_y0_z1_MIP1.h5", num_pairs=1)
    path = tmp_path / "x0_y0_z1_MIP1.h5"
    whole = ImageSet(path).read(0)
    with h5py.File(path, "r+") as file:
        file["img"][0, 0, 3, 4:6] = np.nan, np.inf
        file["img"][0, 1, 5, 6] = -np.inf
    found = ImageSet(path).read(0)
    for side, where in ((0, (3, slice(4, 6))), (1, (5, 6))):
        expected = whole[side].copy()
        expected[where] = 0
        np.testing.assert_array_equal(found[side], expected)


def test_what_is_not_finite_in_a_volume_is_no_data_in_a_download(tmp_path):
    image = np.random.default_rng(0).normal(100, 20, (3, 1, 64, 64)).astype(np.float32)
    image[1, 0, 5, 6:9] = np.nan, np.inf, -np.inf
    volume = make_volume(tmp_path / "v", [image])
    argv = ["--cv_path", volume, "--dst_folder", str(tmp_path / "d"), "--mip", "0"]
    argv += ["--patch_size", "64", "--z_start", "1", "--z_end", "3", "--normalize"]
    download_image.main(argv)
    (images,) = find_image_sets(tmp_path / "d")
    src = images.read(0).src
    assert np.isfinite(src).all() and (src == 0).sum() == 3
    assert not src[5, 6:9].any()
