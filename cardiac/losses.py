"""The losses: image similarity, smoothness, overlap of labels, cross-entropy."""

import functools

import torch
import torch.nn.functional as F

from cardiac import CLASSES, parallel

IGNORED = 255  # the value of pixels without a label


def local_ncc(warped, fixed, window=9):
    """1 - mean squared local normalised cross-correlation of two (B, 1, H, W): a scalar in [0, 1].

    Avants et al., 2008, as in VoxelMorph: means and variances over a window x window box. It stays accurate
    on flat patches because each slice is standardised first (so that the 1e-5 does not depend on its scale),
    the box filter is two one-dimensional averages (a summed-area table would lose small variances to
    cancellation in float32), and variances are clamped at 0.
    """
    with torch.autocast(warped.device.type, enabled=False):
        first, second = _standardised(warped.float()), _standardised(fixed.float())
        moments = torch.cat([first, second, first * first, second * second, first * second], dim=1)
        mean1, mean2, square1, square2, product = box_mean(moments, window).chunk(5, dim=1)
        covariance = product - mean1 * mean2
        variance1 = (square1 - mean1 * mean1).clamp(min=0)
        variance2 = (square2 - mean2 * mean2).clamp(min=0)
        return 1 - (covariance * covariance / (variance1 * variance2 + 1e-5)).mean()


def box_mean(images, window):
    """Mean of images (..., H, W), float32, over a window x window box, clipped at the border.

    A product with a banded matrix along each axis; although dense, it is faster on a CPU than `avg_pool2d`.
    """
    rows, columns = (_averaging_matrix(n, window, images.device) for n in images.shape[-2:])
    return rows @ images @ columns.T


@functools.lru_cache(8)
def _averaging_matrix(n, window, device):
    """A matrix (n, n) whose row i averages the `window` pixels around i, clipped at the border."""
    place = torch.arange(n, device=device)
    near = ((place[:, None] - place).abs() <= window // 2).float()
    return near / near.sum(1, keepdim=True)


def _standardised(image):
    deviation, mean = torch.std_mean(image, dim=(-2, -1), keepdim=True, correction=0)
    return (image - mean) / (deviation + 1e-5)


def diffusion(velocity):
    """Smoothness: mean squared difference of a velocity (B, 2, h, w) between adjacent pixels of its grid."""
    along_h = velocity[..., 1:, :] - velocity[..., :-1, :]
    along_w = velocity[..., 1:] - velocity[..., :-1]
    return (along_h.square().mean() + along_w.square().mean()) / 2


def one_hot(labels):
    """One-hot LV, MYO, RV (B, 3, H, W) float32 of labels (B, H, W) from 0 to 3, or IGNORED: all 0."""
    regions = torch.arange(1, CLASSES, device=labels.device, dtype=labels.dtype)
    return (labels[:, None] == regions.view(1, -1, 1, 1)).float()


def region_dice(labels, target):
    """Dice (3,) of LV, MYO, RV between two label maps (Z, H, W) of a case; NaN if both lack the region."""
    found, wanted = one_hot(labels), one_hot(target)
    return 2 * (found * wanted).sum((0, 2, 3)) / (found + wanted).sum((0, 2, 3))


def overlap_loss(warped, fixed, labelled):
    """1 - soft Dice of warped and fixed regions, both (B, 3, H, W); labelled: (B,), both with expert labels.

    The mean over the regions that both slices show, in labelled samples: a region that one slice lacks (apex,
    base) cannot be matched and is left out, not scored 0. 0 if no region is left. Processes that share a
    batch divide by their mean count, so that the mean of their losses is that of the whole batch; they must
    all call this.
    """
    areas = warped.sum((-2, -1)), fixed.sum((-2, -1))
    counted = labelled[:, None] & (areas[0] > 0) & (areas[1] > 0)
    dice = 2 * (warped * fixed).sum((-2, -1)) / (areas[0] + areas[1]).clamp(min=1e-6)
    return ((1 - dice) * counted).sum() / _mean_count(counted)


def difference_loss(warped, fixed, labelled):
    """Mean squared difference of warped and fixed regions; arguments as for `overlap_loss`.

    Over labelled samples. Unlike `overlap_loss` it weights all pixels equally, and it shrinks a region that
    the fixed slice lacks (the base has left it) as far as a diffeomorphism can.
    """
    difference = (warped - fixed).square().mean((1, 2, 3))
    return (difference * labelled).sum() / _mean_count(labelled)


def _mean_count(counted):
    """How many elements of a bool tensor are True, mean over the processes; at least 1 over all of them."""
    return parallel.process_mean(counted.sum()).clamp(min=1 / parallel.processes())


def cross_entropy(logits, labels, trust=None):
    """Mean cross-entropy of logits (B, 4, H, W) and labels (B, H, W) over the pixels that are not IGNORED.

    trust: (B, H, W), the weight of each pixel in the mean; None: the same for all.
    """
    entropy = F.cross_entropy(logits.float(), labels.long(), ignore_index=IGNORED, reduction="none")
    weight = (labels != IGNORED).float() if trust is None else (labels != IGNORED) * trust
    return (entropy * weight).sum() / weight.sum().clamp(min=1e-6)


def soft_dice_loss(logits, labels, trust=None):
    """1 - soft Dice (Milletari et al., 2016) of LV, MYO and RV; arguments as for `cross_entropy`.

    Over the whole batch, so that a slice without a region does not score 0 for it.
    """
    weight = (labels != IGNORED)[:, None]
    weight = weight if trust is None else weight * trust[:, None]
    probabilities = logits.float().softmax(1)[:, 1:]
    target = one_hot(labels)
    shared = (weight * probabilities * target).sum((0, 2, 3))
    total = (weight * (probabilities + target)).sum((0, 2, 3))
    return 1 - (2 * shared / total.clamp(min=1e-6)).mean()
