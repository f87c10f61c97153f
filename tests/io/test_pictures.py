import numpy as np
import pytest
from PIL import Image

from metroem.errors import FieldError
from metroem.io.pictures import GAP_PX, color_field, overlay, save_pair_picture


@pytest.fixture
def image():
    # Brighter along rows, so that transposing shows.
    return np.repeat(np.arange(1, 49, dtype=np.uint8)[:, None] * 5, 64, axis=1)


def test_a_picture_is_transposed_and_shows_three_panels(tmp_path, image):
    path = tmp_path / "new" / "pair.png"
    save_pair_picture(path, image, image, image, np.zeros((2, 48, 64)))
    picture = np.asarray(Image.open(path))
    assert picture.shape == (64, 3 * 48 + 2 * GAP_PX, 3)
    first = picture[:, :48, 0].astype(int)
    assert (np.diff(first, axis=1) >= 0).all()  # rows of the array run along x
    assert (first == first[:1]).all()
    assert (picture[:, -48:] == 255).all()  # no displacement is white


def test_an_overlay_of_equal_images_is_grey_and_blank_stays_black(image):
    image[10:20, 5:9] = 0
    colors = overlay(image, image)
    assert (colors[..., 0] == colors[..., 1]).all()
    assert (colors[10:20, 5:9] == 0).all()
    assert (colors[0, 0] > 0).all()


def test_an_overlay_shows_src_in_red_where_tgt_is_blank(image):
    colors = overlay(image, np.zeros_like(image))
    assert (colors[..., 0] > 0).all()
    assert (colors[..., 1:] == 0).all()


def test_colours_of_a_field_tell_direction_and_length():
    field = np.zeros((2, 3, 4))
    field[0, 0] = 2  # along cols
    field[1, 1] = 1  # along rows, half as long
    colors = color_field(field)
    assert (colors[0] == [255, 0, 0]).all()
    np.testing.assert_array_equal(colors[1, 0], [191, 255, 128])  # 90 degrees, pale
    assert (colors[2] == 255).all()


def test_images_and_fields_of_different_sizes_are_refused(tmp_path, image):
    with pytest.raises(FieldError, match="a picture takes"):
        save_pair_picture(
            tmp_path / "a.png", image, image, image, np.zeros((2, 64, 48))
        )
