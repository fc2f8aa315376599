"""What is minimised: image similarity, smoothness, overlap of labels, cross-entropy."""

import functools

import torch
import torch.nn.functional as F

from cardiac import CLASSES, parallel

IGNORED = 255  # the label of a pixel that nobody labelled


def local_ncc(warped, fixed, window=9):
    """1 - squared local normalised cross-correlation of two (B, 1, H, W): a scalar in [0, 1].

    Avants et al., 2008, as VoxelMorph has it: means and variances over a window x window box. On flat patches
    it stays right because each slice is standardised first (its scale no longer matters to the 1e-5), the box
    filter is two one-dimensional averages (a summed-area table would lose small variances to cancellation in
    float32), and variances are clamped at 0.
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
    """Mean of images (..., H, W), float32, over a window x window box, as far as it lies inside.

    By a product with a banded matrix along each axis, dense though it is: on a CPU faster than `avg_pool2d`.
    """
    rows, columns = (_averaging(n, window, images.device) for n in images.shape[-2:])
    return rows @ images @ columns.T


@functools.lru_cache(8)
def _averaging(n, window, device):
    """A matrix (n, n) whose row i averages the `window` about i, as far as it lies inside."""
    place = torch.arange(n, device=device)
    near = ((place[:, None] - place).abs() <= window // 2).float()
    return near / near.sum(1, keepdim=True)


def _standardised(image):
    deviation, mean = torch.std_mean(image, dim=(-2, -1), keepdim=True, correction=0)
    return (image - mean) / (deviation + 1e-5)


def diffusion(velocity):
    """Mean squared forward difference, per pixel of its grid, of a velocity (B, 2, h, w): smoothness."""
    along_h = velocity[..., 1:, :] - velocity[..., :-1, :]
    along_w = velocity[..., 1:] - velocity[..., :-1]
    return (along_h.square().mean() + along_w.square().mean()) / 2


def one_hot(labels):
    """Labels (B, H, W), 0 to 3 or IGNORED (then 0), to regions LV, MYO, RV: (B, 3, H, W) float32."""
    regions = torch.arange(1, CLASSES, device=labels.device, dtype=labels.dtype)
    return (labels[:, None] == regions.view(1, -1, 1, 1)).float()


def region_dice(labels, target):
    """Dice (3,) of LV, MYO, RV of two label maps (Z, H, W) of a case; NaN where both lack the region."""
    found, wanted = one_hot(labels), one_hot(target)
    return 2 * (found * wanted).sum((0, 2, 3)) / (found + wanted).sum((0, 2, 3))


def overlap_loss(warped, fixed, labelled):
    """1 - soft Dice of warped regions with those of the fixed slice, both (B, 3, H, W); labelled: (B,) bool.

    The mean over regions that both slices show, in samples with two expert labels: a region that one of two
    slices lacks (apex, base) has nothing to be carried onto and is left out, not scored 0. 0 where no region
    is left. Processes that share a batch divide by their mean count, so that the mean of their losses is that
    of the whole batch; they must all call this.
    """
    areas = warped.sum((-2, -1)), fixed.sum((-2, -1))
    counted = labelled[:, None] & (areas[0] > 0) & (areas[1] > 0)
    dice = 2 * (warped * fixed).sum((-2, -1)) / (areas[0] + areas[1]).clamp(min=1e-6)
    return ((1 - dice) * counted).sum() / parallel.mean(counted.sum()).clamp(min=1 / parallel.processes())


def difference_loss(warped, fixed, labelled):
    """Mean squared difference of warped regions and those of the fixed slice; arguments as `overlap_loss`.

    Over samples with two expert labels. Unlike `overlap_loss` it counts every pixel alike, and a region that
    the fixed slice lacks, which the base has left, shrinks as far as a diffeomorphism can.
    """
    difference = (warped - fixed).square().mean((1, 2, 3))
    count = parallel.mean(labelled.sum()).clamp(min=1 / parallel.processes())
    return (difference * labelled).sum() / count


def cross_entropy(logits, labels, trust=None):
    """Mean cross-entropy of logits (B, 4, H, W) and labels (B, H, W) over the pixels that are not IGNORED.

    trust: (B, H, W), the weight of each pixel in the mean; None: the same for all.
    """
    entropy = F.cross_entropy(logits.float(), labels.long(), ignore_index=IGNORED, reduction="none")
    weight = (labels != IGNORED).float() if trust is None else (labels != IGNORED) * trust
    return (entropy * weight).sum() / weight.sum().clamp(min=1e-6)


def soft_dice_loss(logits, labels, trust=None):
    """1 - soft Dice (Milletari et al., 2016) of LV, MYO and RV; arguments as `cross_entropy`.

    Over the whole batch, so that a slice without a region does not score 0 for it.
    """
    weight = (labels != IGNORED)[:, None]
    weight = weight if trust is None else weight * trust[:, None]
    probabilities = logits.float().softmax(1)[:, 1:]
    target = one_hot(labels)
    shared = (weight * probabilities * target).sum((0, 2, 3))
    total = (weight * (probabilities + target)).sum((0, 2, 3))
    return 1 - (2 * shared / total.clamp(min=1e-6)).mean()
