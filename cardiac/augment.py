"""A random transform for every sample of a batch, on the device: how patients lie, and what scanners differ in.

Every function draws from a CPU generator (`slices.step_generator`), so that the draws of a step are the same on every
device, and takes a batch whole: no loop over samples.
"""

import math

import torch
import torch.nn.functional as F

from cardiac.warp import warp


def spatial_displacement(generator, batch, size, device, rotation=180, scale=0.2, shift=0.08, elastic=2.0):
    """A displacement (B, 2, S, S), pixels: rotation, anisotropic scale, shift, mirror and an elastic part.

    rotation: degrees to either side; scale: log of the largest factor; shift: share of the size; elastic: standard
    deviation, pixels, of displacements drawn 8 x 8 and interpolated. Half of the samples are mirrored: hearts lie in
    all orientations across scanners, and a mirrored one is as hard to outline.
    """
    draw = torch.rand(6, batch, generator=generator) * 2 - 1
    angle = draw[0] * math.radians(rotation)
    along, across = (torch.exp(draw[k] * scale) for k in (1, 2))
    across = torch.where(draw[3] < 0, -across, across)
    cosine, sine = torch.cos(angle), torch.sin(angle)
    matrix = torch.stack([cosine * along, -sine * across, sine * along, cosine * across], -1).view(batch, 2, 2)
    offset = draw[4:].T * shift * size
    coarse = torch.randn(batch, 2, 8, 8, generator=generator) * elastic
    matrix, offset, coarse = (each.to(device, non_blocking=True) for each in (matrix, offset, coarse))

    axis = torch.arange(size, device=device) - (size - 1) / 2
    position = torch.stack(torch.meshgrid(axis, axis, indexing="ij"))  # (2, S, S), from the centre
    affine = torch.einsum("bij,jhw->bihw", matrix - torch.eye(2, device=device), position) + offset[..., None, None]
    smooth = F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
    return affine + smooth


def move(displacement, images, labels):
    """Warp images (B, C, S, S) linearly and labels (B, K, S, S) uint8 by nearest neighbour; values stay labels."""
    return warp(images, displacement), warp(labels, displacement, "nearest").to(torch.uint8)
