from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from cast_jax.contrastive.correspondence import correspond

HEIGHT, WIDTH, STRIDE = 4, 6, 8
IMAGE = (HEIGHT * STRIDE, WIDTH * STRIDE)
FEATURES = jax.random.normal(jax.random.key(0), (1, HEIGHT, WIDTH, 3))
WHOLE = jnp.array([[0.0, 0.0, *IMAGE]])


_correspond = jax.jit(correspond, static_argnames=("image_size", "strong_grid"))


def read(affine, box=WHOLE, **options):
    options = {"valid_box_weak": WHOLE, **options}
    values, valid = _correspond(FEATURES, jnp.array([affine], jnp.float32), box, image_size=IMAGE, **options)
    grid = options.get("strong_grid", (HEIGHT, WIDTH))
    return np.asarray(values).reshape(*grid, 3), np.asarray(valid).reshape(grid)


def test_identity():
    values, valid = read([[1, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal(values, FEATURES[0])
    assert valid.all()


def test_horizontal_flip_reads_the_mirrored_pixel():
    values, valid = read([[1, 0, 0], [0, -1, IMAGE[1]]])
    np.testing.assert_array_equal(values, FEATURES[0, :, ::-1])
    assert valid.all()


def test_crop_by_whole_feature_pixels_and_what_lies_outside():
    values, valid = read([[1, 0, STRIDE], [0, 1, 2 * STRIDE]])
    np.testing.assert_array_equal(values[: HEIGHT - 1, : WIDTH - 2], FEATURES[0, 1:, 2:])
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[: HEIGHT - 1, : WIDTH - 2] = True
    np.testing.assert_array_equal(valid, expected)


def test_zoom_is_bilinear():
    # The strong view shows the left upper quarter at twice the size: its pixel (1, 1) has its centre at (12, 12) in the
    # strong image, (6, 6) in the weak image, 0.75 feature pixels: a quarter of the way from pixel 0 to pixel 1.
    values, valid = read([[0.5, 0, 0], [0, 0.5, 0]])
    top = 0.75 * FEATURES[0, 0, 0] + 0.25 * FEATURES[0, 0, 1]
    bottom = 0.75 * FEATURES[0, 1, 0] + 0.25 * FEATURES[0, 1, 1]
    np.testing.assert_allclose(values[1, 1], 0.75 * top + 0.25 * bottom, rtol=1e-5)
    assert valid.all()


def test_padding_of_either_view_is_invalid():
    identity = [[1, 0, 0], [0, 1, 0]]
    box = jnp.array([[0.0, 0.0, 2.0 * STRIDE, IMAGE[1]]])
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[:2] = True
    np.testing.assert_array_equal(read(identity, box)[1], expected)
    np.testing.assert_array_equal(read(identity, WHOLE, valid_box_weak=box)[1], expected)
    # The box of the weak view is met by the counterpart, not by the strong pixel itself.
    shifted = read([[1, 0, STRIDE], [0, 1, 0]], WHOLE, valid_box_weak=box)[1]
    np.testing.assert_array_equal(shifted, np.arange(HEIGHT)[:, None] < np.ones((1, WIDTH)))


def test_other_strong_resolution_and_bad_matrix():
    values, valid = read([[1, 0, 0], [0, 1, 0]], strong_grid=(HEIGHT // 2, WIDTH // 2))
    blocks = np.asarray(FEATURES[0]).reshape(2, 2, 3, 2, 3).mean((1, 3))
    np.testing.assert_allclose(values, blocks, rtol=1e-5, atol=1e-6)
    assert valid.all()
    values, valid = read(np.full((2, 3), np.nan))
    assert np.isfinite(values).all()
    assert not valid.any()


def test_gradient_reaches_the_weak_features():
    affine = jnp.array([[[1, 0, STRIDE], [0, 1, 0]]], jnp.float32)

    def total(features):
        values, valid = correspond(features, affine, WHOLE, IMAGE)  # the weak canvas by default
        return jnp.sum(jnp.where(valid[..., None], values, 0))

    gradient = jax.jit(jax.grad(total))(FEATURES)
    np.testing.assert_array_equal(gradient[0, 1:], 1)
    np.testing.assert_array_equal(gradient[0, 0], 0)
