"""Preprocessing: geometry there and back, labels, intensities, and the crop about what moves."""

import numpy as np
import pytest
from datasets import heart
from hypothesis import given, settings
from hypothesis import strategies as st

from cardiac.preprocessing import (
    Grid,
    cine_to_slices,
    intensity_window,
    most_likely,
    motion_centre,
    one_hot,
)
from cardiac.preprocessing import resampling_matrix as matrix

# ------------------------------------------------------------ geometry

pairs = {"shape": st.integers(40, 75), "spacing": st.floats(0.8, 2.0), "centre": st.integers(19, 24)}
grids = st.builds(
    Grid,
    **{name: st.tuples(each, each) for name, each in pairs.items()},
    size=st.sampled_from([32, 48, 64]),
    target=st.floats(0.8, 2.5),
) | st.builds(Grid, st.just((53, 64)), st.just((1.1, 1.7)), st.just(48), st.floats(0.8, 2.5))


def in_mm(n, spacing, centre=None):
    """Positions of n pixels, mm from the centre."""
    return (np.arange(n) - ((n - 1) / 2 if centre is None else centre)) * spacing


def own_axes(grid):
    """Positions of a grid's own pixels along both axes, mm from the centre of its slices."""
    return [in_mm(*each) for each in zip(grid.shape, grid.spacing, grid.centre or (None, None))]


def ramp(x, y):
    return 5 + 0.3 * x[:, None] - 0.2 * y


def covered(axis, other):
    """Pixels of an axis that lie 5 mm and more inside another axis."""
    return (axis > other[0] + 5) & (axis < other[-1] - 5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(grids)
def test_a_ramp_has_the_same_value_at_the_same_place_there_and_back(grid):
    own = own_axes(grid)
    crop = in_mm(grid.size, grid.target)
    slices = grid.to_slices(ramp(*own)[None])[0]
    assert slices.shape == (grid.size, grid.size)
    seen = [covered(crop, axis) for axis in own]
    steps = [grid.target / spacing for spacing in grid.spacing]
    # towards a coarser grid the sampled triangle's centre is off by a few hundredths of a pixel
    tolerance = 0.002 if max(steps) <= 1 else 0.1
    np.testing.assert_allclose(slices[np.ix_(*seen)], ramp(crop, crop)[np.ix_(*seen)], atol=tolerance)

    planes = grid.from_slices(ramp(crop, crop)[None], "edge")[0]
    assert planes.shape == grid.shape
    seen = [covered(axis, crop) for axis in own]
    tolerance = 0.002 if min(steps) >= 1 else 0.1
    np.testing.assert_allclose(planes[np.ix_(*seen)], ramp(*own)[np.ix_(*seen)], atol=tolerance)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(grids, st.floats(-3, 3), st.floats(-3, 3))
def test_a_disc_keeps_its_place_and_area_there_and_back(grid, x0, y0):
    own, crop = own_axes(grid), [in_mm(grid.size, grid.target)] * 2
    disc = np.hypot(own[0][:, None] - x0, own[1] - y0) < 9
    shares = grid.to_slices(one_hot(disc))[0]
    labels = grid.labels_to_slices(disc.astype(np.uint8))
    back = grid.from_slices(one_hot(labels))[0]
    pixels = np.prod(grid.spacing), grid.target**2

    for one, other in (((disc, own, pixels[0]), (shares, crop, pixels[1])),
                       ((labels, crop, pixels[1]), (back, own, pixels[0]))):
        (area, *place), (other_area, *other_place) = moments(*one), moments(*other)
        assert other_area == pytest.approx(area, rel=0.05)
        assert other_place == pytest.approx(place, abs=0.25)
    area, *place = moments(labels, crop, pixels[1])
    assert area == pytest.approx(np.pi * 81, rel=0.2)
    assert place == pytest.approx([x0, y0], abs=1.5), "a hard label is right to a pixel"


def moments(shares, axes, pixel):
    """Area in mm2, and the centre of mass in mm."""
    x, y = ((shares.sum(1 - k) * axis).sum() / shares.sum() for k, axis in enumerate(axes))
    return shares.sum() * pixel, x, y


def test_the_same_grid_changes_nothing():
    grid = Grid((48, 48), (1.3, 1.3), 48, 1.3)
    planes = np.random.default_rng(0).random((2, 48, 48), np.float32)
    np.testing.assert_allclose(grid.to_slices(planes), planes, atol=1e-6)
    np.testing.assert_allclose(grid.from_slices(planes), planes, atol=1e-6)


def test_crop_and_pad_keep_the_centres_on_each_other():
    planes = np.zeros((1, 20, 51), np.float32)
    planes[0, 9:11, 25] = 1  # the middle of an even and of an odd axis
    slices = Grid((20, 51), (1.0, 1.0), 32, 1.0).to_slices(planes)[0]
    expected = np.zeros((32, 32))
    expected[15:17, 15:17] = 0.5
    np.testing.assert_allclose(slices, expected, atol=1e-6)


def test_a_coarser_grid_averages_and_does_not_alias():
    stripes = np.tile([0.0, 1.0], 40)[None].repeat(80, 0)
    slices = Grid((80, 80), (1.0, 1.0), 16, 2.7).to_slices(stripes[None])[0]
    assert np.abs(slices[3:-3, 3:-3] - 0.5).max() < 0.1


@pytest.mark.parametrize("step", [0.4, 1.0, 1.7])
def test_weights_sum_to_1_inside_and_outside_is_zero_or_the_edge(step):
    edge, zero = (matrix(21, 64, step, outside=outside) for outside in ("edge", "zero"))
    np.testing.assert_allclose(edge.sum(1), 1, atol=1e-6)
    assert np.isclose(zero.sum(1), 1).sum() >= min(64, int(18 / step))
    if step == 1.7:  # the first target lies 43 pixels outside
        assert zero[0].sum() == 0
        assert edge[0, 0] == pytest.approx(1)


def test_labels_are_resampled_smoothly_where_nearest_frays_the_edge():
    grid = Grid((24, 24), (3.0, 3.0), 64, 1.0)
    x, fine = in_mm(24, 3.0), in_mm(64, 1.0)
    truth = np.hypot(fine[:, None], fine) < 20
    labels = np.uint8(2 * (np.hypot(x[:, None], x) < 20))
    found = grid.labels_to_slices(labels[None])[0]
    assert set(np.unique(found)) == {0, 2}
    nearest = labels[np.ix_(*[np.rint(fine / 3 + 11.5).astype(int).clip(0, 23)] * 2)] == 2
    assert ((found == 2) != truth).sum() < 0.7 * (nearest != truth).sum()


def test_a_tie_of_regions_with_background_is_background_and_shares_decide():
    shares = np.array([[0.5, 0.4, 0.2, 0.0], [0.0, 0.3, 0.5, 0.1], [0.0, 0.2, 0.2, 0.7]])
    assert most_likely(shares).tolist() == [0, 1, 2, 3]


# ------------------------------------------------------------ intensities


@pytest.mark.parametrize("dtype", [np.int16, np.float64, np.float32])
@pytest.mark.parametrize("scale", [1, 200])
def test_intensities_lie_in_0_to_1_whatever_the_scanner_stores(dtype, scale):
    image, _ = heart((40, 36, 2, 4), 0, 2)
    image = (scale * (image + 50)).astype(dtype)
    image[3, 3, 0, 0] = 30_000  # a bright voxel does not set the scale
    slices = cine_to_slices(image, (1.4, 1.4), 32, 1.4, "centre")[0]
    assert slices.dtype == np.float16
    assert slices.shape == (8, 32, 32)
    assert slices.min() == 0
    assert slices.max() == 1
    assert 0.2 < slices.mean() < 0.8


def test_slices_lie_frame_after_frame():
    image = np.zeros((16, 16, 2, 3), np.float32)
    image += 10 * np.arange(3) + np.arange(2)[:, None]  # 10 t + z
    slices = cine_to_slices(image, (1.0, 1.0), 16, 1.0, "centre")[0][:, 8, 8]
    assert (np.diff(slices.astype(float)) > 0).all()  # row = frame * slices + slice


# ------------------------------------------------------------ where the heart is


def beating(centre, shape=(96, 80), spacing=(1.5, 2.0), frames=6):
    """A disc (X, Y, 1, T) that beats about `centre` (pixels), in a body that does not move."""
    x, y = (in_mm(n, s, c) for n, s, c in zip(shape, spacing, centre))
    distance = np.hypot(x[:, None], y)
    radius = 22 + 6 * np.cos(2 * np.pi * np.arange(frames) / frames)
    body = 0.3 + 0.5 * (np.indices(shape).sum(0) % 17 == 0)
    return np.where(distance[..., None] < radius, 1.0, body[..., None])[:, :, None]


@pytest.mark.parametrize("centre", [(30, 50), (60, 28), (47.5, 39.5)])
def test_the_crop_follows_what_moves_and_not_the_image(centre):
    found = motion_centre(beating(centre), (1.5, 2.0, 8.0))
    assert found == pytest.approx(centre, abs=1.5)
    slices, grid = cine_to_slices(beating(centre), (1.5, 2.0, 8.0), 32, 1.5, "motion")
    assert grid.centre == found
    x, y = np.indices((32, 32)) - 15.5
    assert (slices[:, np.hypot(x, y) < 9] > 0.9).all(), "the disc lies in the middle of the slices"
    _, centred = cine_to_slices(beating(centre), (1.5, 2.0, 8.0), 32, 1.5, "centre")
    assert centred.centre is None


def test_where_nothing_moves_the_crop_is_about_the_image_centre():
    still = beating((30, 50))[..., :1]
    assert motion_centre(still, (1.5, 2.0, 8.0)) == (47.5, 39.5)


def test_what_moves_far_from_the_heart_does_not_pull_the_crop():
    image = np.zeros((160, 128, 2, 6), np.float32)  # 240 x 256 mm
    x, y = np.indices(image.shape[:2])
    image[np.hypot(1.5 * (x - 50), 2 * (y - 40)) < 30, :, 1::2] = 1  # mm
    image[np.hypot(1.5 * (x - 50), 2 * (y - 90)) < 10, :, 1::2] = 1  # 100 mm off, only along Y
    image[np.hypot(1.5 * (x - 120), 2 * (y - 40)) < 10, :, 1::2] = 1  # 105 mm off, only along X
    assert motion_centre(image, (1.5, 2.0, 8.0)) == pytest.approx((50, 40), abs=0.51)
    assert motion_centre(1000 + 200 * image, (1.5, 2.0, 8.0)) == motion_centre(image, (1.5, 2.0, 8.0))


def test_the_crop_lies_at_the_centroid_of_what_moves_most_not_at_its_brightest_spot():
    x, y = np.indices((160, 128))
    large, small = (np.hypot(1.5 * (x - at), 2 * (y - 64)) < mm for at, mm in ((70, 20), (70 + 40 / 1.5, 10)))
    image = np.zeros((160, 128, 1, 6), np.float32)
    image[..., 1::2] = np.where(large | small, 1, 0.2)[..., None, None]  # all of the body moves a little
    ratio = small.sum() / (large | small).sum()  # a fifth: 8 of the 40 mm between the two
    assert motion_centre(image, (1.5, 2.0, 8.0)) == pytest.approx((70 + 40 / 1.5 * ratio, 64), abs=0.51)


def test_an_image_that_is_constant_but_for_a_voxel_keeps_its_range():
    image = np.full((40, 40, 3, 2), 7, np.int16)
    image[0, 0, 0, 0] = 9
    assert intensity_window(image) == (7, 9)


@pytest.mark.parametrize("width", [64, 60, 63])
def test_the_intensity_window_sees_every_column(width):
    image = np.zeros((width, 64, 8, 110), np.uint8, order="F")  # at most one voxel in 3 is sampled
    assert image.size // 1_000_000 == 3
    image[::3] = np.arange(64)[:, None, None]
    image[1::3] = image[2::3] = 200
    assert intensity_window(image) == (1, 200)
