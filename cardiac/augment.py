"""Random augmentation, on the device: every sample gets its own patient orientation and scanner appearance.

Every function draws from a CPU generator (`slices.step_generator`), so that the draws of a step are the same
on every device (except pixel noise, which is drawn on the device), and processes a whole batch at once, not
sample by sample. Processes that share a batch draw for all of it and keep their part.
"""

import math

import torch
import torch.nn.functional as F

from cardiac.parallel import processes, share
from cardiac.slices import PairBatch, step_generator
from cardiac.warp import warp

AUGMENTATION_OFFSET = 2**31  # offset of the step: draws independent of its slices'


def spatial_displacement(generator, batch, size, device, rotation=180, scale=0.2, shift=0.08, elastic=2.0):
    """A random displacement (B, 2, S, S), pixels: rotation, anisotropic scale, shift, mirror, elastic part.

    rotation: largest angle, degrees; scale: log of the largest factor; shift: share of the size; elastic:
    standard deviation, pixels, of displacements drawn 8 x 8 and interpolated. Half of the samples are
    mirrored: hearts lie in all orientations across scanners, and a mirrored one is as hard to segment.
    """
    whole = batch * processes()
    draw = share(torch.rand(6, whole, generator=generator), 1) * 2 - 1
    angle = draw[0] * math.radians(rotation)
    along, across = (torch.exp(draw[k] * scale) for k in (1, 2))
    across = torch.where(draw[3] < 0, -across, across)
    cosine, sine = torch.cos(angle), torch.sin(angle)
    matrix = torch.stack([cosine * along, -sine * across, sine * along, cosine * across], -1)
    matrix, offset = matrix.view(batch, 2, 2), draw[4:].T * shift * size
    coarse = share(torch.randn(whole, 2, 8, 8, generator=generator)) * elastic
    matrix, offset, coarse = (each.to(device, non_blocking=True) for each in (matrix, offset, coarse))

    axis = torch.arange(size, device=device) - (size - 1) / 2
    position = torch.stack(torch.meshgrid(axis, axis, indexing="ij"))  # (2, S, S), from the centre
    affine = torch.einsum("bij,jhw->bihw", matrix - torch.eye(2, device=device), position)
    smooth = F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
    return smooth.add_(affine).add_(offset[..., None, None])


def warp_both(displacement, images, labels):
    """Warp images (B, C, S, S) linearly, labels (B, K, S, S) uint8 by nearest neighbour."""
    return warp(images, displacement), warp(labels, displacement, "nearest").to(torch.uint8)


def vary_intensity(
    generator, images, gamma=0.5, histogram=0.5, contrast=0.3, bias=0.4, blur=1.0, noise=0.05, resolution=1.0
):
    """Vary images (B, C, S, S) in [0, 1] as scanners do; the C channels of a sample vary alike.

    gamma: log of the largest exponent of the contrast curve; histogram: log of the largest factor by which
    one of five equal ranges of intensity is stretched, all being scaled to fill [0, 1] again; contrast:
    largest relative change of gain, and .3 of it of offset; bias: twice the largest standard deviation of the
    log of a smooth coil shading, drawn 3 x 3; blur: largest standard deviation, pixels, of a Gaussian, cut to
    three taps; noise: largest standard deviation of Rician noise, drawn per pixel, as in a scanner;
    resolution: largest share, in half of the samples, of the image at half the resolution, noise included,
    as scanners interpolate what they have acquired.
    """
    batch, channels, height, width = images.shape
    device, whole = images.device, batch * processes()
    draw = share(torch.rand(12, whole, 1, 1, 1, generator=generator), 1)
    coarse = share(torch.randn(whole, 1, 3, 3, generator=generator))
    seed = torch.randint(2**31, (), generator=generator).item()
    draw, coarse = draw.to(device, non_blocking=True), coarse.to(device, non_blocking=True)
    spread = 2 * draw - 1

    images = images.clamp(0, 1) ** torch.exp(spread[0] * gamma)
    fifth = torch.arange(5.0, device=device).view(5, 1, 1, 1, 1)
    stretch = torch.softmax(spread[7:] * histogram, 0)
    images = (5 * images - fifth).clamp_(0, 1).mul_(stretch).sum(0)
    # in place from here: allocation costs most
    images.mul_(1 + spread[1] * contrast).add_(spread[2] * contrast * 0.3).clamp_(min=0)
    shading = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    images.mul_(shading.mul_(0.5 * bias * draw[3]).exp_())
    sigma = blur * draw[4]
    tap = torch.exp(-0.5 / (sigma**2).clamp(min=1e-2))  # roll wraps around: hearts are away from the edge
    for axis in (2, 3):
        before, after = (torch.roll(images, shift, axis) for shift in (-1, 1))
        images = before.add_(after).mul_(tap).add_(images).div_(1 + 2 * tap)
    pixels = torch.Generator(device).manual_seed(seed)  # many numbers: drawn on the device
    normal = torch.randn(2, whole, channels, height, width, generator=pixels, device=device)
    real, imaginary = share(normal, 1).mul_(noise * draw[5])
    images.add_(real).hypot_(imaginary)
    halved = F.avg_pool2d(images, 2)
    halved = F.interpolate(halved, size=(height, width), mode="bilinear", align_corners=False)
    return images.lerp_(halved, spread[6].clamp(min=0) * resolution).clamp_(0, 1.5)


def augment_pairs(batch, seed, step):
    """A `PairBatch` whose pairs, labels included, are each warped by a random displacement."""
    images = torch.cat([batch.moving, batch.fixed], 1)
    generator = step_generator(seed, AUGMENTATION_OFFSET + step)
    displacement = spatial_displacement(generator, len(images), images.shape[-1], images.device)
    labels = torch.stack([batch.moving_labels, batch.fixed_labels], 1)
    images, labels = warp_both(displacement, images, labels)
    return PairBatch(images[:, :1], images[:, 1:], labels[:, 0], labels[:, 1], batch.labelled)


def augment_slices(images, labels, trust, seed, step):
    """Images (B, 1, S, S), labels and trust (B, S, S): each sample warped and its image varied at random."""
    generator = step_generator(seed, AUGMENTATION_OFFSET + step)
    displacement = spatial_displacement(generator, len(images), images.shape[-1], images.device)
    images, maps = warp_both(displacement, images, torch.stack([labels, trust], 1))
    return vary_intensity(generator, images), *maps.unbind(1)
