"""The random transforms: labels stay labels, move with the image, and depend only on (seed, step)."""

import pytest
import torch

from cardiac import augment
from cardiac.losses import IGNORED
from cardiac.slices import PairBatch, step_generator

SIZE = 64


def disc(batch=8):
    """Images with a bright disc off the centre, and its labels, with one sample unlabelled."""
    axis = torch.arange(SIZE) - SIZE / 2
    mask = ((axis[:, None] - 6) ** 2 + (axis + 4) ** 2 < 12**2).expand(batch, SIZE, SIZE)
    labels = mask.to(torch.uint8) * 2
    labels[0] = IGNORED
    return mask[:, None].float(), labels


def test_labels_stay_labels_and_lie_where_the_image_does():
    images, labels = disc()
    images, labels = augment.warp_both(
        augment.spatial_displacement(step_generator(0, 0), len(images), SIZE, images.device),
        images,
        labels[:, None],
    )
    assert set(labels.unique().tolist()) == {0, 2, IGNORED}
    assert (labels[0] == IGNORED).all()
    inside, outside = images[1:][labels[1:] == 2], images[1:][labels[1:] == 0]
    assert inside.min() >= 0.25  # the nearest pixel is the disc's: a quarter of the weight at least
    assert outside.max() <= 0.75


def test_every_sample_has_a_draw_of_its_own():
    displacement = augment.spatial_displacement(step_generator(0, 0), 6, SIZE, torch.device("cpu"))
    distances = torch.cdist(displacement.flatten(1), displacement.flatten(1))
    assert distances[~torch.eye(6, dtype=bool)].min() > 10


@pytest.mark.parametrize("limits", [{"rotation": 0, "scale": 0, "shift": 0, "elastic": 0}])
def test_without_amplitude_only_mirrors_are_left(limits):
    displacement = augment.spatial_displacement(step_generator(0, 0), 16, SIZE, torch.device("cpu"), **limits)
    images = torch.rand(16, 1, SIZE, SIZE)
    moved, _ = augment.warp_both(displacement, images, torch.zeros(16, 1, SIZE, SIZE, dtype=torch.uint8))
    same = [torch.allclose(a, b, atol=1e-4) for a, b in zip(moved, images)]
    mirrored = [torch.allclose(a, b.flip(-1), atol=1e-4) for a, b in zip(moved, images)]
    assert all(a != b for a, b in zip(same, mirrored))
    assert 3 < sum(same) < 13


def test_rotation_turns_by_no_more_than_asked():
    limits = {"rotation": 20, "scale": 0, "shift": 0, "elastic": 0}
    displacement = augment.spatial_displacement(step_generator(1, 0), 32, SIZE, torch.device("cpu"), **limits)
    x = torch.tensor([SIZE - 1.0, (SIZE - 1) / 2]) - (SIZE - 1) / 2  # the middle of the last row
    moved = x + displacement[:, :, SIZE - 1, SIZE // 2]
    angle = torch.atan2(moved[:, 1], moved[:, 0]).rad2deg()
    assert angle.abs().max() < 22  # half a pixel off the axis adds a degree
    assert angle.abs().max() > 15


def test_the_linear_part_turns_what_it_has_scaled_and_mirrored():
    grid = torch.device("cpu"), 180, 0.2, 0.08, 0.0  # without an elastic part it is a matrix and a shift
    displacement = augment.spatial_displacement(step_generator(2, 0), 64, SIZE, *grid)
    centre = displacement[:, :, 31:33, 31:33].mean((2, 3))
    corner = displacement[:, :, :2, :2]
    columns = corner[:, :, 1, 0] - corner[:, :, 0, 0], corner[:, :, 0, 1] - corner[:, :, 0, 0]
    matrix = torch.stack(columns, -1) + torch.eye(2)
    product = matrix.mT @ matrix
    assert torch.allclose(product[:, 0, 1], torch.zeros(64), atol=1e-4), "axes stay at right angles"
    factors = product.diagonal(dim1=1, dim2=2).sqrt().log()
    assert factors.abs().max() <= 0.2001
    assert (factors.amin(0) < -0.15).all()
    assert (factors.amax(0) > 0.15).all()
    assert (factors[:, 0] - factors[:, 1]).abs().max() > 0.1, "each axis has its own"
    assert 16 < (matrix.det() < 0).sum() < 48, "half are mirrored"
    assert 0.07 * SIZE < centre.abs().max() <= 0.0801 * SIZE


def test_draws_depend_on_seed_and_step_alone():
    images, labels = disc()
    first = augment.augment_slices(images, labels, labels * 80, 3, 7)
    torch.rand(100)
    again = augment.augment_slices(images, labels, labels * 80, 3, 7)
    other = augment.augment_slices(images, labels, labels * 80, 3, 8)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_pairs_move_together_and_keep_their_own_images_and_labels():
    images, labels = disc()
    batch = PairBatch(images, images / 2, labels, (labels > 0).to(torch.uint8), torch.ones(8, dtype=bool))
    moved = augment.augment_pairs(batch, 0, 0)
    assert torch.equal(moved.moving, 2 * moved.fixed)
    assert torch.equal(moved.moving_labels[1:], 2 * moved.fixed_labels[1:])
    assert (moved.moving_labels[0] == IGNORED).all()
    assert not torch.allclose(moved.moving, images, atol=0.1)
    assert torch.equal(moved.labelled, batch.labelled)
    other = augment.augment_pairs(batch, 0, 1)
    assert not torch.allclose(moved.moving, other.moving, atol=0.1)


OFF = {"gamma": 0, "histogram": 0, "contrast": 0, "bias": 0, "blur": 0, "noise": 0, "resolution": 0}


def vary(images, **limits):
    """Images varied in only one way."""
    return augment.vary_intensity(step_generator(0, 0), images, **{**OFF, **limits})


def test_intensities_vary_by_sample_and_stay_bounded():
    varied = augment.vary_intensity(step_generator(0, 0), torch.ones(16, 1, SIZE, SIZE))
    assert varied.isfinite().all()
    assert varied.min() >= 0
    assert varied.max() == 1.5
    means, spreads = varied.mean((1, 2, 3)), varied.std((1, 2, 3))
    assert means.std() > 0.03
    assert spreads.max() > 2 * spreads.min()


def test_what_resampling_has_brought_outside_of_0_to_1_stays_a_number():
    images = torch.tensor([-1e-3, 0.5, 1.001]).view(1, 1, 1, 3).repeat(4, 1, 8, 4)
    assert augment.vary_intensity(step_generator(0, 0), images).isfinite().all()


def test_gamma_is_one_exponent_a_sample():
    values = torch.tensor([0.2, 0.5, 0.9])
    exponents = (vary(values.repeat(64, 1, 8, 4), gamma=0.5)[:, 0, 0, :3].log() / values.log()).log()
    assert torch.allclose(exponents, exponents[:, :1].expand(-1, 3), atol=1e-3)
    assert 0.45 < exponents.abs().max() <= 0.501
    assert 16 < (exponents[:, 0] > 0).sum() < 48


def test_histogram_stretches_fifths_and_keeps_black_white_and_their_order():
    levels = vary(torch.linspace(0, 1, 11).repeat(64, 1, 8, 1), histogram=0.5)[:, 0, 0]
    assert torch.allclose(levels[:, 0], torch.zeros(64), atol=1e-6)
    assert torch.allclose(levels[:, -1], torch.ones(64), atol=1e-6)
    rises = levels.diff(dim=1)
    assert torch.allclose(rises[:, ::2], rises[:, 1::2], atol=1e-6), "linear within a fifth"
    factors = rises[:, ::2].log()
    largest = factors.amax(1) - factors.amin(1)
    assert 0.8 < largest.max() <= 1.0001
    assert largest.min() > 0.05
    assert torch.corrcoef(factors.T).fill_diagonal_(0).abs().max() < 0.6, "each fifth by its own draw"


def test_contrast_is_one_gain_and_one_offset_a_sample():
    low, middle, high = vary(torch.tensor([0.4, 0.6, 0.8]).repeat(64, 1, 8, 4), contrast=0.3)[:, 0, 0, :3].T
    assert torch.allclose(high - middle, middle - low, atol=1e-5)
    gain = (high - low) / 0.4
    offset = low - 0.4 * gain
    assert 0.27 < (gain - 1).abs().max() <= 0.3001
    assert 0.08 < offset.abs().max() <= 0.0901
    assert torch.corrcoef(torch.stack([gain, offset]))[0, 1].abs() < 0.4, "drawn independently"


def test_shading_is_smooth_and_of_one_strength_a_sample():
    shading = vary(torch.full((64, 1, SIZE, SIZE), 0.5), bias=0.4)[:, 0].div(0.5).log()
    assert shading.diff(dim=1).diff(dim=1).abs().max() < 0.02
    assert shading.diff(dim=2).diff(dim=2).abs().max() < 0.02
    spread = shading.std((1, 2))
    assert spread.min() < 0.03
    assert 0.1 < spread.max() < 0.4


def test_blur_spreads_a_point_alike_to_all_sides_and_loses_nothing():
    point = torch.zeros(64, 1, 9, 9)
    point[..., 4, 4] = 1
    spread = vary(point, blur=1.0)[:, 0]
    assert torch.allclose(spread.sum((1, 2)), torch.ones(64), atol=1e-5)
    for same in (spread.flip(1), spread.flip(2), spread.mT):
        assert torch.allclose(spread, same, atol=1e-6)
    axis = torch.arange(-4.0, 5)
    deviation = (spread.sum(1) * axis**2).sum(1).sqrt()  # with three taps at most .74, for sigma 1
    assert deviation.min() < 0.05
    assert 0.7 < deviation.max() < 0.75
    assert torch.equal(spread[:, 4, 4], spread.amax((1, 2)))
    assert (spread[:, [0, 1, 2, 6, 7, 8]] == 0).all()


def test_noise_is_that_of_a_magnitude():
    dark = vary(torch.zeros(64, 1, SIZE, SIZE), noise=0.05)
    sigma = (dark.square().mean((1, 2, 3)) / 2).sqrt()  # Rayleigh
    assert 0.045 < sigma.max() <= 0.051
    assert sigma.min() < 0.005
    assert torch.allclose(dark.mean((1, 2, 3)), sigma * (torch.pi / 2) ** 0.5, rtol=0.05)
    bright = vary(torch.full((64, 1, SIZE, SIZE), 0.8), noise=0.05)
    assert torch.allclose(bright.std((1, 2, 3)), sigma, rtol=0.06), "far from 0 it is normal"


def test_resolution_takes_a_share_of_the_detail_from_half_of_the_samples():
    pixels = torch.arange(SIZE)
    board = ((pixels[:, None] + pixels) % 2).float().expand(64, 1, SIZE, SIZE)
    kept = vary(board, resolution=1.0)[:, 0]
    assert torch.allclose(kept.mean((1, 2)), torch.full((64,), 0.5), atol=1e-4)
    detail = 2 * kept.std((1, 2), correction=0)  # half the resolution shows nothing of a board
    assert 20 < (detail > 0.999).sum() < 44
    assert detail.min() < 0.1
    assert (detail[detail < 0.999] - 0.5).abs().mean() > 0.1, "each by its own share"
    assert ((detail > 0.2) & (detail < 0.8)).sum() > 10
    ramp = torch.linspace(0, 1, SIZE).repeat(64, 1, SIZE, 1)
    inside = (Ellipsis, slice(1, -1))
    assert torch.allclose(vary(ramp, resolution=1.0)[inside], ramp[inside], atol=1e-5), "and moves nothing"


def test_resolution_is_lost_after_noise():
    noise = vary(torch.full((64, 1, SIZE, SIZE), 0.8), noise=0.05, resolution=1.0)[:, 0] - 0.8
    neighbours = (noise[:, 1:] * noise[:, :-1]).mean((1, 2)) / noise.square().mean((1, 2))
    assert neighbours.max() > 0.5
    assert (neighbours.abs() < 0.1).sum() > 20


def test_what_is_dark_stays_dark():
    """A negative offset is cut at 0: its magnitude would make the darkest tissue brighter."""
    ramp = torch.linspace(0, 1, SIZE).expand(32, 1, SIZE, SIZE).contiguous()
    varied = vary(ramp, contrast=0.3)
    assert (varied.diff(dim=-1) >= -1e-6).all()
    assert (varied[..., 0] < 1e-6).all(-1).float().mean() > 0.2


def test_no_amplitude_changes_nothing():
    images = torch.rand(4, 1, SIZE, SIZE)
    assert torch.allclose(vary(images), images, atol=1e-5)
