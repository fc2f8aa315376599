"""The spatial transformer and what is built on it, against closed forms and scipy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm
from scipy.ndimage import gaussian_filter, map_coordinates

from cardiac.networks import RegistrationNetwork, register
from cardiac.warp import compose, integrate, jacobian_determinant, remove_folds, resize_displacement, warp

ODD = (37, 26)


def positions(size):
    """Pixel positions relative to the centre, (2, H, W) float64."""
    grid = np.stack(np.meshgrid(*(np.arange(n, dtype=float) for n in size), indexing="ij"))
    return grid - (np.array(size).reshape(2, 1, 1) - 1) / 2


def linear(matrix, size, shift=(0, 0)):
    """The field matrix @ position + shift: (1, 2, H, W) float32."""
    field = np.tensordot(np.array(matrix), positions(size), 1) + np.array(shift, float).reshape(2, 1, 1)
    return torch.from_numpy(field[None]).float()


def smooth(size, seed, strength):
    noise = np.random.default_rng(seed).normal(size=(1, 2, *size))
    field = gaussian_filter(noise, (0, 0, 5, 5))
    return torch.from_numpy(strength * field / np.abs(field).max()).float()


@pytest.mark.parametrize("shift", [(2, 0), (0, 3), (-4, 2), (1, -5)])
def test_a_translation_moves_the_image_against_the_displacement(shift):
    moving = torch.zeros(1, 1, *ODD)
    moving[0, 0, 15, 12] = 1
    warped = warp(moving, linear(np.zeros((2, 2)), ODD, shift))
    expected = torch.zeros(1, 1, *ODD)
    expected[0, 0, 15 - shift[0], 12 - shift[1]] = 1  # warped(x) = moving(x + u): channel 0 along H
    torch.testing.assert_close(warped, expected, atol=1e-5, rtol=0)


def test_half_a_pixel_interpolates_linearly():
    ramp = torch.arange(8.0).repeat(6, 1)[None, None]
    warped = warp(ramp, linear(np.zeros((2, 2)), (6, 8), (0.3, 0.5)))
    torch.testing.assert_close(warped[..., :-1], ramp[..., :-1] + 0.5)


@pytest.mark.parametrize("size", [(16, 16), ODD, (5, 40)])
@pytest.mark.parametrize(("mode", "order"), [("bilinear", 1), ("nearest", 0)])
def test_warp_agrees_with_scipy_outside_too(size, mode, order):
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, 3, *size)).astype(np.float32)
    displacement = rng.normal(scale=6, size=(2, 2, *size)).astype(np.float32)  # reaches far outside: border
    found = warp(torch.from_numpy(image), torch.from_numpy(displacement), mode).numpy()
    grid = np.indices(size)
    for b in range(2):
        for c in range(3):
            at = grid + displacement[b]
            expected = map_coordinates(image[b, c], at, order=order, mode="nearest")
            np.testing.assert_allclose(found[b, c], expected, atol=2e-4)


SIDE = st.integers(1, 20)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.floats(-1e3, 1e3, width=32), st.tuples(SIDE, SIDE), st.floats(0, 50), st.integers(0, 9))
def test_a_constant_stays_constant(value, size, strength, seed):
    noise = torch.randn(1, 2, *size, generator=torch.Generator().manual_seed(seed))
    image = torch.full((1, 1, *size), value)
    torch.testing.assert_close(warp(image, strength * noise), image, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "matrix",
    [
        [[0, -0.3], [0.3, 0]],  # rotation
        [[0.15, 0], [0, -0.1]],  # growth and shrinkage
        [[0.05, 0.2], [-0.1, -0.05]],
    ],
)
def test_integration_is_the_exponential_of_a_linear_velocity(matrix):
    size = (41, 48)
    found = integrate(linear(matrix, size))
    expected = linear(expm(np.array(matrix)) - np.eye(2), size)
    inside = (slice(None), slice(None), slice(12, -12), slice(12, -12))  # no path from here meets the border
    torch.testing.assert_close(found[inside], expected[inside], atol=0.02, rtol=0)


def test_a_constant_velocity_is_its_own_displacement():
    velocity = linear(np.zeros((2, 2)), ODD, (1.5, -2))
    torch.testing.assert_close(integrate(velocity), velocity)


def test_a_velocity_and_its_negative_undo_each_other():
    velocity = smooth((48, 40), 0, 4.0)
    forth, back = integrate(velocity), integrate(-velocity)
    assert forth.abs().max() > 2
    for residual in (compose(forth, back), compose(back, forth)):
        assert residual[..., 8:-8, 8:-8].abs().max() < 0.1
    assert jacobian_determinant(forth).min() > 0


def test_composition_equals_warping_twice_and_keeps_the_order():
    noise = np.random.default_rng(1).normal(size=(1, 1, 48, 40))
    image = torch.from_numpy(gaussian_filter(noise, (0, 0, 4, 4))).float()
    first = linear([[0, -0.2], [0.2, 0]], (48, 40))
    second = linear(np.zeros((2, 2)), (48, 40), (4, 0))
    inside = (..., slice(12, -12), slice(12, -12))
    twice = warp(warp(image, first), second)[inside]
    torch.testing.assert_close(warp(image, compose(first, second))[inside], twice, atol=5e-3, rtol=0)
    assert (warp(image, compose(second, first))[inside] - twice).abs().max() > 0.02


def test_composition_of_linear_maps_is_their_product():
    first, second = np.array([[1.1, 0.2], [0, 0.9]]), np.array([[0.9, -0.1], [0.1, 1.0]])
    found = compose(linear(first - np.eye(2), ODD), linear(second - np.eye(2), ODD))
    expected = linear(first @ second - np.eye(2), ODD)
    torch.testing.assert_close(found[..., 6:-6, 6:-6], expected[..., 6:-6, 6:-6], atol=1e-4, rtol=0)


AFFINE = (np.eye(2), [[1.2, 0.3], [-0.1, 0.8]], [[-1, 0], [0, 1]], [[0.5, 0], [0.4, 2]])


@pytest.mark.parametrize("matrix", AFFINE)
def test_jacobian_of_an_affine_map_is_its_determinant(matrix):
    determinant = jacobian_determinant(linear(np.array(matrix) - np.eye(2), ODD, (3, -1)))
    assert determinant.shape == (1, *ODD)
    expected = torch.full((1, *ODD), float(np.linalg.det(matrix)))
    torch.testing.assert_close(determinant, expected, atol=1e-4, rtol=0)


SIZES = (((16, 20), (48, 60)), ((15, 16), (37, 80)), ((48, 60), (16, 20)))


@pytest.mark.parametrize(("small", "large"), SIZES)
def test_a_resized_displacement_is_the_same_motion_in_other_pixels(small, large):
    matrix, shift = np.array([[0.1, -0.2], [0.05, 0.15]]), np.array([0.3, -0.2])  # in half fields of view

    def field(size):
        half = np.array(size).reshape(2, 1, 1) / 2
        motion = np.tensordot(matrix, positions(size) / half, 1) + shift.reshape(2, 1, 1)
        return torch.from_numpy((motion * half)[None]).float()

    found = resize_displacement(field(small), large)
    edge = [max(1, -(-b // a)) for a, b in zip(small, large)]  # beyond the last sample's centre it is clamped
    inside = (..., slice(edge[0], -edge[0]), slice(edge[1], -edge[1]))
    torch.testing.assert_close(found[inside], field(large)[inside], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(24, 32)])
def test_half_resolution_velocity_warps_by_full_pixels(size):
    velocity = torch.zeros(1, 2, size[0] // 2, size[1] // 2)
    velocity[:, 1] = 1.5
    moving = torch.zeros(1, 1, *size)
    moving[..., 10, 15] = 1
    warped = warp(moving, resize_displacement(integrate(velocity), size))
    assert warped[0, 0, 10, 12] == pytest.approx(1, abs=1e-5)  # 1.5 half-resolution pixels are 3 pixels


def test_everything_stays_in_float32_under_autocast():
    velocity, image = smooth((32, 32), 2, 3.0), torch.rand(1, 1, 64, 64)

    def whole():
        displacement = resize_displacement(integrate(velocity), (64, 64))
        return warp(image, displacement), displacement, jacobian_determinant(displacement)

    expected = whole()
    with torch.autocast("cpu", torch.bfloat16):
        found = whole()
    for one, other in zip(found, expected):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, atol=0, rtol=0)
    assert warp(image.bfloat16(), resize_displacement(velocity.bfloat16(), (64, 64))).dtype == torch.float32


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_a_displacement_that_is_not_finite_crashes_nothing(value):
    """grid_sample's backward pass on the CPU crashes the process if a coordinate is NaN."""
    displacement = torch.full((2, 2, 32, 32), value, requires_grad=True)
    warp(torch.rand(2, 4, 32, 32), displacement).sum().backward()
    assert displacement.grad.shape == displacement.shape


def test_the_gradient_reaches_the_velocity():
    velocity = smooth((16, 16), 3, 1.0).requires_grad_()
    displacement = resize_displacement(integrate(velocity), (32, 32))
    ((warp(torch.rand(1, 1, 32, 32), displacement) - 0.5) ** 2).mean().backward()
    assert velocity.grad.isfinite().all()
    assert velocity.grad.abs().max() > 0


def test_no_identity_grid_in_the_state_dict():
    assert {name.rpartition(".")[2] for name in RegistrationNetwork().state_dict()} == {"weight", "bias"}


def velocities(size, strengths):
    """Rough velocities (B, 2, H, W): the stronger, the more they fold."""
    noise = np.random.default_rng(3).normal(size=(len(strengths), 2, *size))
    field = gaussian_filter(noise, (0, 0, 2, 2)) * np.reshape(strengths, (-1, 1, 1, 1))
    return torch.from_numpy(field).float()


def test_remove_folds_mends_slices_that_fold_and_leaves_the_others_alone():
    velocity = velocities((24, 20), (2, 40, 0, 60))
    plain = resize_displacement(integrate(velocity), (48, 40))
    folded = (jacobian_determinant(plain) <= 0).flatten(1).any(1)
    assert folded.tolist() == [False, True, False, True]
    found = remove_folds(velocity, (48, 40))
    assert (jacobian_determinant(found) > 0).all()
    assert torch.equal(found[~folded], plain[~folded])
    # as little as it takes: most of the motion stays
    assert found[1].norm() > 0.5 * plain[1].norm()
    assert torch.equal(remove_folds(velocity, (48, 40), passes=0), plain)


def test_a_registration_does_not_fold():
    class Folding(torch.nn.Module):
        def forward(self, moving, fixed, regions):
            return velocities((24, 20), [60] * len(moving))

    slices, labels = torch.zeros(3, 1, 48, 40), torch.zeros(3, 48, 40, dtype=torch.uint8)
    displacement = register(Folding(), slices, slices, labels)
    assert displacement.shape == (3, 2, 48, 40)
    assert displacement.abs().max() > 1
    assert (jacobian_determinant(displacement) > 0).all()
