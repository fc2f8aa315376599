"""From a case's own grid and intensities to the slices that the networks see, and back to that grid.

Slices keep the axes of the NIfTI array, X along H and Y along W.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from scipy.sparse import csr_array

from cardiac import CLASSES


@dataclass(frozen=True)
class Grid:
    """The in-plane mapping from a case's own grid to the cache's slices and back.

    shape: (X, Y) pixels; spacing: their (x, y) spacing, mm; size, target: pixels and mm of the square slice.
    centre: the (x, y) pixel at the slice's centre; None: the centre of the image.
    """

    shape: tuple
    spacing: tuple
    size: int
    target: float
    centre: tuple | None = None

    @property
    def shift(self):
        """Offset (x, y) of the slices' centre from the image's, in pixels of the case's own grid."""
        return [c - (n - 1) / 2 for c, n in zip(self.centre, self.shape)] if self.centre else [0.0, 0.0]

    def to_slices(self, planes):
        """Resample planes (..., X, Y) to slices (..., S, S), zeros outside the image."""
        steps = [self.target / s for s in self.spacing]
        return self._apply(planes, self.shape, (self.size,) * 2, steps, self.shift, "zero")

    def from_slices(self, slices, outside="zero"):
        """Resample slices (..., S, S) to planes (..., X, Y); outside the crop: "zero" or the "edge" value."""
        steps = [s / self.target for s in self.spacing]
        shift = [-pixels * step for pixels, step in zip(self.shift, steps)]
        return self._apply(slices, (self.size,) * 2, self.shape, steps, shift, outside)

    def labels_to_slices(self, labels):
        """Resample labels (..., X, Y) uint8: one-hot linearly, then arg max (nearest: ragged edges)."""
        return most_likely(self.to_slices(one_hot(labels)))

    def inside(self):
        """Whether each pixel (X, Y) lies inside the crop."""
        masks = []
        for n, spacing, shift in zip(self.shape, self.spacing, self.shift):
            distance = np.abs(np.arange(n) - (n - 1) / 2 - shift) * spacing
            masks.append(distance <= self.size * self.target / 2)
        return masks[0][:, None] & masks[1]

    @staticmethod
    def _apply(planes, source, target, steps, shift, outside):
        axes = zip(source, target, steps, shift)
        rows, columns = (resampling_matrix(*axis, outside) for axis in axes)
        planes = planes.astype(np.float32, copy=False)
        resampled = np.empty((*planes.shape[:-2], *target), np.float32)
        for index in np.ndindex(planes.shape[:-2]):
            resampled[index] = rows @ (columns @ planes[index].T).T
        return resampled


@functools.lru_cache(maxsize=4)  # a case has two axes, and the same for every frame
def resampling_matrix(source, target, step, shift=0.0, outside="zero"):
    """Linear interpolation along one axis as a sparse matrix (target, source), float32.

    Target sample i lies at c = (source - 1) / 2 + shift + (i - (target - 1) / 2) * step. The kernel is a
    triangle scaled to the coarser of the two grids, against aliasing. outside: "zero" or "edge".
    """
    width = max(1.0, step)
    centres = (source - 1) / 2 + shift + (np.arange(target) - (target - 1) / 2) * step
    reach = int(np.ceil(width))
    taps = np.floor(centres)[:, None] + np.arange(-reach, reach + 2)
    weights = np.maximum(0, 1 - np.abs(taps - centres[:, None]) / width)
    weights /= weights.sum(1, keepdims=True)
    if outside == "zero":
        weights[(taps < 0) | (taps >= source)] = 0
    rows, columns = np.indices(taps.shape)[0], taps.clip(0, source - 1).astype(int)
    matrix = csr_array((weights.ravel(), (rows.ravel(), columns.ravel())), (target, source), np.float32)
    matrix.eliminate_zeros()
    return matrix


def one_hot(labels):
    """One-hot LV, MYO, RV (3, ..., X, Y) float32 of labels (..., X, Y)."""
    return np.array([labels == region for region in range(1, CLASSES)], np.float32)


def most_likely(regions):
    """Most likely labels (...) uint8 by the shares (3, ...) of LV, MYO, RV; the rest is background."""
    share = regions.max(0)
    # as `propagation.harden`; comparisons take a third of the time of `argmax`
    lv, myo = (region < share for region in regions[:2])
    return (1 + lv.astype(np.uint8) + (lv & myo)) * (share > 1 - regions.sum(0))


def cine_to_slices(image, spacing, size, target, crop):
    """Slices (T * Z, S, S) float16, intensities in [0, 1], of a cine (X, Y, Z, T), and their `Grid`.

    spacing: of the cine, mm; size, target: pixels and mm of the slices; crop: "centre" of the image, or
    "motion", see `motion_centre`.
    """
    centre = motion_centre(image, spacing) if crop == "motion" else None
    grid = Grid(image.shape[:2], tuple(spacing[:2]), size, target, centre)
    low, high = intensity_window(image)
    slices = np.empty((image.shape[3], image.shape[2], size, size), np.float16)
    for frame in range(image.shape[3]):
        planes = image[..., frame].transpose(2, 0, 1).astype(np.float32)
        planes = np.clip(planes, low, high, out=planes)
        planes -= low
        planes /= high - low
        # torch's conversion to float16 takes a twentieth of NumPy's time
        torch.from_numpy(slices[frame]).copy_(torch.from_numpy(grid.to_slices(planes)))
    return slices.reshape(-1, size, size), grid


def intensity_window(image):
    """The intensities that become 0 and 1: the 1st and 99th percentile of the case.

    Single bright voxels (fat near the coil, flow), ten times as bright as blood, must not set the scale.
    """
    sample = image.ravel(order="K")
    step = max(1, sample.size // 1_000_000)
    while math.gcd(step, image.shape[0]) > 1:  # or it would sample the same few X in every row
        step += 1
    sample = sample[::step].astype(np.float32)
    sample.sort()  # of float32: half the time of `percentile` or less
    low, high = (float(sample[round(share * (len(sample) - 1))]) for share in (0.01, 0.99))
    if not high > low:  # constant except for single voxels
        low, high = float(image.min()), float(image.max())
    return low, high


def motion_centre(image, spacing, blur=20.0, radius=64.0):
    """The (x, y) pixel at the centre of motion of a cine (X, Y, Z, T): finds the heart without a label.

    The intensities' standard deviation over time, averaged over slices, is largest at the heart. Mean shift:
    from the maximum of its blur (mm), five steps to the centroid, within `radius` (mm), of the tenth of all
    pixels that moves most. In whole pixels from the image's centre, which is returned if nothing moves.
    """
    low, high = intensity_window(image)
    slices = (image[:, :, z].astype(np.float32) for z in range(image.shape[2]))
    planes = (np.clip((plane - low) / (high - low), 0, 1) for plane in slices)
    motion = sum(plane.std(-1) for plane in planes) / image.shape[2]
    middle = np.array([(n - 1) / 2 for n in motion.shape])
    weights = np.clip(motion - np.percentile(motion, 90), 0, None)
    if not weights.any():
        return tuple(middle.tolist())
    pixel = np.array(spacing[:2])
    blurred = gaussian_filter(motion, blur / pixel, mode="constant")
    centre = np.array(np.unravel_index(blurred.argmax(), motion.shape), float)
    positions = np.stack(np.indices(motion.shape), -1)
    for _ in range(5):
        near = weights * (np.abs((positions - centre) * pixel).max(-1) <= radius)
        if near.any():
            centre = (positions * near[..., None]).sum((0, 1)) / near.sum()
    return tuple((middle + np.round(centre - middle)).tolist())
