"""The losses, against brute force and closed forms."""

import numpy as np
import pytest
import torch

from cardiac.losses import (
    IGNORED,
    box_mean,
    cross_entropy,
    difference_loss,
    diffusion,
    local_ncc,
    one_hot,
    overlap_loss,
    region_dice,
    soft_dice_loss,
)
from cardiac.metrics import dice


@pytest.mark.parametrize("window", [1, 5, 9])
def test_a_box_at_the_edge_averages_what_lies_inside(window):
    images = torch.rand(2, 3, 7, 12)
    half, options = window // 2, {"stride": 1, "count_include_pad": False}
    pooled = torch.nn.functional.avg_pool2d(images.double(), (window, 1), padding=(half, 0), **options)
    pooled = torch.nn.functional.avg_pool2d(pooled, (1, window), padding=(0, half), **options)
    torch.testing.assert_close(box_mean(images, window), pooled.float())


def brute_force_ncc(first, second, window=9):
    """1 - squared NCC over every window, clipped at the border, in float64, pixel by pixel."""
    half, values = window // 2, []
    for one, other in zip(first[:, 0].double().numpy(), second[:, 0].double().numpy()):
        one, other = ((image - image.mean()) / (image.std() + 1e-5) for image in (one, other))
        for i, j in np.ndindex(one.shape):
            box = slice(max(0, i - half), i + half + 1), slice(max(0, j - half), j + half + 1)
            a, b = one[box] - one[box].mean(), other[box] - other[box].mean()
            values.append((a * b).mean() ** 2 / ((a * a).mean() * (b * b).mean() + 1e-5))
    return 1 - np.mean(values)


@pytest.mark.parametrize("scale", [1, 1e4])
@pytest.mark.parametrize("offset", [0, 10.0])
@pytest.mark.parametrize("flat", [False, True])
def test_local_ncc_agrees_with_brute_force_in_float64(scale, offset, flat):
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(2, 1, 24, 21, generator=generator)
    second = (first + 0.4 * torch.rand(2, 1, 24, 21, generator=generator)) ** 2
    if flat:
        first[..., :14] = 0.25
        second[..., 6:, :] = 1
    first, second = scale * (first + offset), scale * (second + offset)
    assert local_ncc(first, second).item() == pytest.approx(brute_force_ncc(first, second), abs=1e-3)


def test_local_ncc_of_an_image_and_its_affine_copy_is_near_0_and_of_noise_near_1():
    image, noise = torch.rand(2, 2, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    assert local_ncc(image, 3 - 2 * image).item() == pytest.approx(0, abs=1e-3)
    assert local_ncc(image, noise).item() > 0.9


@pytest.mark.parametrize("value", [0.0, 1.0, 5e4])
def test_local_ncc_of_constant_slices_is_finite_with_a_finite_gradient(value):
    image = torch.full((1, 1, 16, 16), value, requires_grad=True)
    loss = local_ncc(image, torch.rand(1, 1, 16, 16))
    loss.backward()
    assert 0 <= loss.item() <= 1.001
    assert image.grad.isfinite().all()


def test_diffusion_of_a_linear_field_is_the_mean_square_of_its_slopes():
    h, w = torch.meshgrid(torch.arange(7.0), torch.arange(5.0), indexing="ij")
    velocity = torch.stack([2 * h - w, 3 * w])[None]
    # along H: channels 2 and 0, along W: -1 and 3
    assert diffusion(velocity).item() == pytest.approx(((4 + 0) / 2 + (1 + 9) / 2) / 2)
    assert diffusion(torch.ones(2, 2, 6, 6)) == 0


def test_one_hot_has_the_regions_in_order_and_nothing_where_ignored():
    found = one_hot(torch.tensor([[[0, 1], [2, 3], [IGNORED, 1]]], dtype=torch.uint8))
    assert found.dtype == torch.float32
    expected = [[[0, 1], [0, 0], [0, 1]], [[0, 0], [1, 0], [0, 0]], [[0, 0], [0, 1], [0, 0]]]
    assert found[0].tolist() == expected


def test_region_dice_is_that_of_the_whole_case_and_nan_where_neither_shows_a_region():
    generator = torch.Generator().manual_seed(0)
    labels, target = torch.randint(0, 4, (2, 5, 9, 7), generator=generator).to(torch.uint8)
    expected = [dice(labels.numpy() == k, target.numpy() == k) for k in (1, 2, 3)]
    assert region_dice(labels, target).tolist() == pytest.approx(expected)
    labels[labels == 3] = 0
    assert region_dice(labels, target)[2] == 0
    target[target == 3] = 0
    assert region_dice(labels, target)[2].isnan()


def halves(*columns):
    """A region (1, 8, 8) that fills these columns."""
    region = torch.zeros(1, 8, 8)
    region[..., list(columns)] = 1
    return region


def test_overlap_is_one_minus_dice_of_regions_that_both_slices_show():
    empty = halves()
    fixed = torch.stack([torch.cat([halves(0, 1), halves(4, 5), empty])])
    warped = torch.stack([torch.cat([halves(1, 2), empty, halves(6)])])  # MYO, RV: in only one slice
    loss = overlap_loss(warped, fixed, torch.tensor([True]))
    assert loss.item() == pytest.approx(0.5)


def test_overlap_leaves_out_samples_without_two_labels():
    fixed = torch.stack([torch.cat([halves(0, 1)] * 3)] * 2)
    warped = torch.stack([torch.cat([halves(0, 1)] * 3), torch.cat([halves(6, 7)] * 3)])
    assert overlap_loss(warped, fixed, torch.tensor([True, False])).item() == pytest.approx(0)
    assert overlap_loss(warped, fixed, torch.tensor([True, True])).item() == pytest.approx(0.5)


@pytest.mark.parametrize("labelled", [True, False])
def test_overlap_without_any_region_is_0_with_a_gradient_of_0(labelled):
    warped = torch.zeros(2, 3, 8, 8, requires_grad=True)
    loss = overlap_loss(warped, torch.zeros(2, 3, 8, 8), torch.tensor([labelled] * 2))
    loss.backward()
    assert loss.item() == 0
    assert not warped.grad.any()


def test_difference_counts_every_pixel_of_labelled_samples_and_shrinks_what_the_fixed_slice_lacks():
    fixed = torch.stack([torch.cat([halves(0, 1), halves(4), halves()])] * 2)
    warped = torch.stack([torch.cat([halves(0, 1), halves(4), halves(6)]), torch.ones(3, 8, 8)])
    warped.requires_grad_()
    loss = difference_loss(warped, fixed, torch.tensor([True, False]))
    loss.backward()
    assert loss.item() == pytest.approx(8 / (3 * 64))  # one column that the fixed slice lacks
    assert (warped.grad[0, 2, :, 6] > 0).all()
    assert not warped.grad[1].any()
    assert difference_loss(warped, fixed, torch.tensor([False, False])) == 0


def test_cross_entropy_ignores_what_nobody_labelled():
    logits = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.zeros(2, 6, 6, dtype=torch.uint8)
    labels[0, :3] = 2
    labels[0, 3:] = IGNORED
    labels[1] = IGNORED
    loss = cross_entropy(logits, labels)
    expected = -logits[0, :, :3].log_softmax(0)[2].mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert not logits.grad[1].any()
    assert not logits.grad[0, :, 3:].any()


def test_background_is_learnt_not_ignored():
    logits = torch.zeros(1, 4, 4, 4, requires_grad=True)
    cross_entropy(logits, torch.zeros(1, 4, 4, dtype=torch.uint8)).backward()
    assert (logits.grad[:, 0] < 0).all()


def test_cross_entropy_is_float32_from_bfloat16_logits():
    logits = torch.randn(1, 4, 4, 4)
    labels = torch.ones(1, 4, 4, dtype=torch.uint8)
    assert cross_entropy(logits.bfloat16(), labels).dtype == torch.float32


def test_soft_dice_of_certain_predictions_is_their_dice_where_labelled():
    labels = torch.tensor([[[1, 1, 2, 3, 0, IGNORED]]], dtype=torch.uint8)
    predicted = torch.tensor([[[1, 0, 2, 3, 3, 1]]])
    logits = 100 * torch.nn.functional.one_hot(predicted, 4).permute(0, 3, 1, 2).float()
    dice = (2 / 3 + 1 + 2 / 3) / 3  # the last pixel does not count
    assert soft_dice_loss(logits, labels).item() == pytest.approx(1 - dice, abs=1e-5)


def test_what_is_trusted_less_weighs_less_and_what_nobody_labelled_nothing():
    logits = torch.randn(1, 4, 1, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[[1, 0, 2, IGNORED]]], dtype=torch.uint8)
    trust = torch.tensor([[[1.0, 0.5, 0.0, 0.7]]])
    certain = -logits[0, :, 0].log_softmax(0)
    expected = (certain[1, 0] + 0.5 * certain[0, 1]) / 1.5
    assert cross_entropy(logits, labels, trust).item() == pytest.approx(expected.item(), rel=1e-5)
    share = logits[0, :, 0].softmax(0)
    dice = [2 * share[1, 0] / (share[1, 0] + 1 + 0.5 * share[1, 1]), 0, 0]  # RV's label is nowhere
    assert soft_dice_loss(logits, labels, trust).item() == pytest.approx(1 - sum(dice).item() / 3, rel=1e-5)


@pytest.mark.parametrize("loss", [cross_entropy, soft_dice_loss])
def test_a_batch_without_any_label_has_a_finite_loss_and_no_gradient(loss):
    logits = torch.randn(1, 4, 4, 4, requires_grad=True)
    found = loss(logits, torch.full((1, 4, 4), IGNORED, dtype=torch.uint8), torch.ones(1, 4, 4))
    found.backward()
    assert found.isfinite()
    assert not logits.grad.any()
