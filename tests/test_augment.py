"""The random transforms: labels stay labels, move with the image, and depend on (seed, step) alone."""

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
    images, labels = augment.move(
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
    moved, _ = augment.move(displacement, images, torch.zeros(16, 1, SIZE, SIZE, dtype=torch.uint8))
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


def test_draws_depend_on_seed_and_step_alone():
    images, labels = disc()
    first = augment.augment_slices(images, labels, labels * 80, 3, 7)
    torch.rand(100)
    again = augment.augment_slices(images, labels, labels * 80, 3, 7)
    other = augment.augment_slices(images, labels, labels * 80, 3, 8)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_pairs_move_together():
    images, labels = disc()
    batch = PairBatch(images, images.clone(), labels, labels.clone(), torch.ones(8, dtype=bool))
    moved = augment.augment_pairs(batch, 0, 0)
    assert torch.equal(moved.moving, moved.fixed)
    assert torch.equal(moved.moving_labels, moved.fixed_labels)
    assert not torch.allclose(moved.moving, images, atol=0.1)
    assert torch.equal(moved.labelled, batch.labelled)


def test_intensities_vary_by_sample_and_stay_bounded():
    images = torch.rand(16, 1, 1, 1).expand(16, 1, SIZE, SIZE) * 0 + 0.5
    varied = augment.vary_intensity(step_generator(0, 0), images)
    assert varied.isfinite().all()
    assert varied.min() >= 0
    assert varied.max() <= 1.5
    means, spreads = varied.mean((1, 2, 3)), varied.std((1, 2, 3))
    assert means.std() > 0.03
    assert spreads.max() > 2 * spreads.min()


def test_what_is_dark_stays_dark():
    """A lower offset does not fold the darkest tissue up: a magnitude is not negative."""
    ramp = torch.linspace(0, 1, SIZE).expand(32, 1, SIZE, SIZE).contiguous()
    off = {"gamma": 0, "bias": 0, "blur": 0, "noise": 0}
    varied = augment.vary_intensity(step_generator(0, 0), ramp, **off)
    assert (varied.diff(dim=-1) >= -1e-6).all()
    assert (varied[..., 0] < 1e-6).all(-1).float().mean() > 0.2


def test_no_amplitude_changes_nothing():
    images = torch.rand(4, 1, SIZE, SIZE)
    off = {"gamma": 0, "contrast": 0, "bias": 0, "blur": 0, "noise": 0}
    assert torch.allclose(augment.vary_intensity(step_generator(0, 0), images, **off), images, atol=1e-5)
