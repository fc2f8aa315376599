"""Spatial transformer, diffeomorphic integration, composition and the Jacobian determinant, in 2-D.

One convention everywhere. An image is (B, C, H, W) with the axes of the NIfTI array, X along H and Y along W.
A displacement is (B, 2, H, W) in pixels of its own grid, channel 0 along H and channel 1 along W, and it
points from the fixed grid into the moving image:

    warped(x) = moving(x + displacement(x))

so the labels of ED reach frame t with moving = ED and fixed = t. A velocity is stationary, has the same
layout and is never used for warping; `integrate` gives its displacement. Pixel i of N lies at (2 i + 1) /
N - 1 (`align_corners=False`), for every resize and every `grid_sample`; `_normalised` is the one place where
pixels become normalised coordinates. All of it runs in float32 outside autocast: a bfloat16 coordinate
is off by up to a fifth of a pixel at 192 pixels.
"""

import functools

import torch
import torch.nn.functional as F


def warp(image, displacement, mode="bilinear"):
    """Resample `image` (B, C, H, W) at x + displacement(x): a spatial transformer (Jaderberg et al., 2015).

    displacement: (B, 2, H, W) in pixels. mode: "bilinear" or "nearest". What lies outside takes the value at
    the border, since zeros would draw dark tissue into the image. Returns float32 (B, C, H, W).
    """
    with torch.autocast(image.device.type, enabled=False):
        return _sample(image.float(), _normalised(displacement.float()), mode)


def integrate(velocity, steps=7):
    """The displacement exp(v) of a stationary velocity (B, 2, H, W), by scaling and squaring.

    Arsigny et al., 2006; Dalca et al., 2019: u = v / 2^steps, then `steps` times u <- u o (id + u) + u. The
    inverse displacement is `integrate(-velocity)`.
    """
    with torch.autocast(velocity.device.type, enabled=False):
        # scaled once, not at every step: sampling commutes with that; as two planes, not channels_last
        u = _normalised(velocity.float().contiguous()) / 2**steps
        for _ in range(steps):
            u = u + _sample(u, u)
        return _in_pixels(u)


def compose(first, second):
    """The displacement of x -> y + first(y) with y = x + second(x); both (B, 2, H, W) in pixels.

    Warping by the result equals warping by `first` and then by `second`, without the blur of two
    interpolations: warp(image, compose(first, second)) = warp(warp(image, first), second).
    """
    return second + warp(first, second)


def resize_displacement(displacement, size):
    """Resample a displacement (B, 2, h, w) to another grid of the same field of view, size = (H, W).

    Its values are pixels, so they grow with the grid by H / h and W / w (`align_corners=False`).
    """
    grown = displacement.float() * _growth(*displacement.shape[-2:], *size, displacement.device)
    with torch.autocast(displacement.device.type, enabled=False):
        return F.interpolate(grown, size=size, mode="bilinear", align_corners=False)


def remove_folds(velocity, size, passes=20):
    """The displacement (B, 2, H, W) of a velocity (B, 2, h, w), size = (H, W), with its folds smoothed away.

    exp(v) never folds, but sampled on pixels it can, where v shrinks what the fixed slice lacks to almost
    nothing. The velocity of a slice that folds is averaged over 3 x 3 pixels and integrated again until it
    does not, at most `passes` times. For inference: every pass waits for the device.
    """
    displacement = resize_displacement(integrate(velocity), size)
    for _ in range(passes):
        folded = (jacobian_determinant(displacement) <= 0).flatten(1).any(1)
        if not folded.any():
            break
        smooth = F.avg_pool2d(F.pad(velocity, (1, 1, 1, 1), mode="replicate"), 3, 1)
        velocity = torch.where(folded[:, None, None, None], smooth, velocity)
        displacement = resize_displacement(integrate(velocity), size)
    return displacement


def jacobian_determinant(displacement):
    """det(I + grad u) of a displacement (B, 2, H, W), by central differences: (B, H, W).

    The factor by which a pixel of the fixed grid grows when mapped into the moving image: above 1, what is
    carried shrinks; 0 or less is a fold. It does not depend on the unit of either axis.
    """
    du_dh, du_dw = torch.gradient(displacement.float(), dim=(-2, -1))
    return (1 + du_dh[:, 0]) * (1 + du_dw[:, 1]) - du_dw[:, 0] * du_dh[:, 1]


def _sample(image, offset, mode="bilinear"):
    """`image` (B, C, H, W) at x + offset(x), where the offset (B, 2, H, W) is `_normalised`; float32."""
    grid = _pixels(*offset.shape[-2:], offset.device)[0] + offset
    with torch.no_grad():  # a gradient here would cost as much as that of sampling
        # on the CPU the backward pass of `grid_sample` would read and write outside its tensors for NaN
        grid.nan_to_num_(nan=0.0)
    # the coordinates lie in memory as two planes, which are written and read faster than pairs
    grid = grid.permute(0, 2, 3, 1)
    return F.grid_sample(image, grid, mode=mode, padding_mode="border", align_corners=False)


def _normalised(displacement):
    """A displacement in pixels, (along H, W), as `grid_sample` wants it: (along W, H), in half grid sizes."""
    return displacement.flip(1) * _pixels(*displacement.shape[-2:], displacement.device)[1]


def _in_pixels(offset):
    """The inverse of `_normalised`."""
    return (offset / _pixels(*offset.shape[-2:], offset.device)[1]).flip(1)


# used ten times per step; on a GPU each would take many launches, or a copy that waits
@functools.lru_cache(16)
def _pixels(height, width, device):
    """Normalised coordinates (1, 2, H, W), (along W, H), of a grid's pixels, and their step (1, 2, 1, 1)."""
    axes = [(2 * torch.arange(n, device=device, dtype=torch.float32) + 1) / n - 1 for n in (width, height)]
    step = torch.tensor([2 / width, 2 / height], dtype=torch.float32, device=device)
    return torch.stack(torch.meshgrid(*axes, indexing="xy"))[None], step.view(1, 2, 1, 1)


@functools.lru_cache(16)
def _growth(h, w, height, width, device):
    """Pixels of a grid (H, W) per pixel of a grid (h, w), along both axes: (1, 2, 1, 1) float32."""
    return torch.tensor([height / h, width / w], dtype=torch.float32, device=device).view(1, 2, 1, 1)
