"""HD95 and ASSD of heart-like masks: `cardiac.metrics.surface_distances` against MONAI's two functions.

    python benchmarks/surface_distances.py [--pairs 20] [--rounds 7]

Masks of LV, MYO and RV as ACDC has them (216 x 256 x 10, voxels of 1.5 x 1.5 x 10 mm): the reference a ring
and a crescent, the prediction the same with other radii, shifted. `stray` adds one voxel far away, as bad
predictions have; `apart` moves the prediction off the heart. Both run in turn on the same masks, in one
process, on one thread; the ratio, one a round, is MONAI's time for its two functions to that of our one.
Needs MONAI (`pip install -e '.[bench]'`).
"""

import argparse
import time

import monai
import numpy as np
import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

from cardiac.metrics import surface_distances

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
    """`count` triples of (prediction, reference) pairs."""
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


def seconds(function, pairs):
    start = time.perf_counter()
    for pair in pairs:
        function(*pair)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=20, help="hearts of each kind, three regions each")
    parser.add_argument("--rounds", type=int, default=7, help="times that both are run over all of them")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"MONAI {monai.__version__}, torch {torch.__version__}; masks {SHAPE} at {SPACING} mm; ms a pair")
    print(f"{'masks':8} {'ours':>8} {'MONAI':>9} {'ratio: median (min to max)':>28} {'differ by mm':>13}")
    for kind in ("alike", "stray", "apart"):
        pairs = list(pairs_of(kind, arguments.pairs, np.random.default_rng(0)))
        worst = max(np.abs(np.subtract(ours(*pair), theirs(*pair))).max() for pair in pairs)  # warms up, too
        times = np.array([(seconds(ours, pairs), seconds(theirs, pairs)) for _ in range(arguments.rounds)])
        ratio = times[:, 1] / times[:, 0]
        mine, other = 1000 * np.median(times, axis=0) / len(pairs)
        spread = f"{np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})"
        print(f"{kind:8} {mine:8.2f} {other:9.2f} {spread:>28} {worst:13.1e}", flush=True)


if __name__ == "__main__":
    main()
