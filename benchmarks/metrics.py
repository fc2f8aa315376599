"""HD95 and ASSD of heart-like masks: `cardiac.metrics.surface_distances` against MONAI's two functions.

Masks of LV, MYO and RV. `alike`: the prediction is the reference with other radii, shifted by a pixel or so;
`stray`: with one voxel far away, as in bad predictions; `apart`: moved off the heart.
"""

from functools import partial

import numpy as np
import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

from benchmarks.common import Row, in_turn, milliseconds, ratio
from cardiac.metrics import surface_distances

PAIRS = 8
SHAPE, SPACING = (216, 256, 10), (1.5, 1.5, 10.0)


def heart(centre, radius, wall):
    """Masks (X, Y, Z) of LV, MYO and RV: half ellipsoids with their base on the last slice; lengths in mm."""
    axes = [(np.arange(n) - n / 2) * step - at for n, step, at in zip(SHAPE, SPACING, centre)]
    x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
    depth = z - 40  # the base, from which the cavities go down towards the apex

    def ellipsoid(x, y, across, along, length):
        return (x / across) ** 2 + (y / along) ** 2 + (depth / length) ** 2 <= 1

    cavity = ellipsoid(x, y, radius, radius, 75)
    outer = ellipsoid(x, y, radius + wall, radius + wall, 80)
    right = ellipsoid(x + radius + wall, y, radius, 1.6 * radius, 70)
    return cavity, outer & ~cavity, right & ~outer


def pairs_of(kind, count, rng):
    """Yield (prediction, reference) of LV, MYO and RV of `count` hearts, 3 x `count` pairs."""
    for _ in range(count):
        centre, radius, wall = rng.uniform(-20, 20, 3) * (1, 1, 0), rng.uniform(18, 30), rng.uniform(7, 12)
        reference = heart(centre, radius, wall)
        moved = centre + (rng.normal(0, 1.5, 3) * (1, 1, 0) if kind != "apart" else np.array([70, 90, 0]))
        prediction = heart(moved, radius + rng.normal(0, 1), wall + rng.normal(0, 1))
        for predicted, true in zip(prediction, reference):
            if kind == "stray":
                predicted[3, 5, 0] = True
            yield predicted, true


def ours(prediction, reference):
    return surface_distances(prediction, reference, SPACING)


def theirs(prediction, reference):
    masks = [torch.from_numpy(mask)[None, None] for mask in (prediction, reference)]
    options = {"include_background": True, "spacing": list(SPACING)}
    hd95 = compute_hausdorff_distance(*masks, percentile=95, **options)
    assd = compute_average_surface_distance(*masks, symmetric=True, **options)
    return hd95.item(), assd.item()


def score_all(score, pairs):
    for pair in pairs:
        score(*pair)


def sections(rounds):
    """(title, text, rows) of the table."""
    rows = []
    for kind in ("alike", "stray", "apart"):
        pairs = list(pairs_of(kind, PAIRS, np.random.default_rng(0)))
        times = in_turn({each.__name__: partial(score_all, each, pairs) for each in (ours, theirs)}, rounds)
        worst = max(np.abs(np.subtract(ours(*pair), theirs(*pair))).max() for pair in pairs)
        rows.append(milliseconds(f"HD95 and ASSD, {kind}: ours", times["ours"], 1 / len(pairs)))
        rows.append(ratio("... ours / MONAI's two functions", times["ours"], times["theirs"], at_most=1.0))
        rows.append(Row("... largest difference", [worst], "mm", at_most=1e-3))
    text = (
        f"LV, MYO and RV of {PAIRS} hearts on a grid like ACDC's: {' x '.join(map(str, SHAPE))} voxels of "
        f"{' x '.join(f'{mm:g}' for mm in SPACING)} mm. Alike: the prediction is close to the reference; "
        "stray: with one voxel far away, as in bad predictions; apart: moved off the heart."
    )
    yield "Surface distances", text, rows
