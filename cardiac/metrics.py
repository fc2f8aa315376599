"""Evaluation metrics: overlap, surface distances and volumes of a case, and statistics over patients.

Everything here takes and returns numpy arrays and plain floats, without torch, so that it can run in worker
processes. NaN means "undefined" and never a bad result: averages leave it out and say how often. Definitions
follow Taha & Hanbury, BMC Med. Imaging, 2015.
"""

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from cardiac import LABELS

MYOCARDIUM_DENSITY = 1.05  # g/ml: mass of the myocardium = its volume times this
SCORES = ("dice", "hd95_mm", "assd_mm", "volume_ml", "reference_volume_ml")


# ---------------------------------------------------------------------------------- one pair of masks


def dice(prediction, reference):
    """Dice coefficient 2 |A and B| / (|A| + |B|) of two masks; NaN if both are empty, 0 if one is."""
    prediction, reference = _pair(prediction, reference)
    total = np.count_nonzero(prediction) + np.count_nonzero(reference)
    return 2 * np.count_nonzero(prediction & reference) / total if total else np.nan


def volume_ml(mask, spacing):
    """Volume in ml of a mask (X, Y, Z) whose voxels measure `spacing` (3,) mm."""
    return float(np.count_nonzero(mask) * np.prod(np.asarray(spacing, float)) / 1000)


def surface_distances(prediction, reference, spacing):
    """HD95 and ASSD in mm of two masks (X, Y, Z), voxels of `spacing` (3,) mm; (NaN, NaN) if either is empty.

    The surface of a mask is its voxels with at least one of the six face neighbours outside it; beyond the
    array counts as outside. With d(A, B) the distances from every surface voxel of A to the nearest of B
    (centre to centre, exact):

    - HD95: the larger of the 95th percentiles of d(A, B) and of d(B, A), interpolated linearly;
    - ASSD: the mean of d(A, B) and d(B, A) pooled, so that the larger surface weighs more. The mean of the
      two directed means, which some use, is another number.

    Both agree with MONAI 1.6.1, `compute_hausdorff_distance(percentile=95)` and
    `compute_average_surface_distance(symmetric=True)`, which return NaN and infinity if one mask is empty.
    """
    prediction, reference = _pair(prediction, reference)
    spacing = np.asarray(spacing, float)
    if prediction.ndim != 3 or spacing.shape != (3,):
        raise ValueError(f"masks must be 3-D with three spacings, not {prediction.shape} with {spacing}")
    if not prediction.any() or not reference.any():
        return np.nan, np.nan
    (box,) = ndimage.find_objects((prediction | reference).view(np.uint8))
    # what erosion by the six face neighbours removes; outside the array is background
    first, second = (mask[box] & ~ndimage.binary_erosion(mask[box]) for mask in (prediction, reference))
    forth, back = _directed(first, second, spacing), _directed(second, first, spacing)
    hd95 = max(np.percentile(forth, 95), np.percentile(back, 95))
    return float(hd95), float(np.concatenate([forth, back]).mean())


def _pair(prediction, reference):
    """Both as boolean arrays. Different shapes are an error, since they would broadcast silently."""
    prediction, reference = np.asarray(prediction, bool), np.asarray(reference, bool)
    if prediction.shape != reference.shape:
        raise ValueError(f"masks differ in shape: {prediction.shape} and {reference.shape}")
    return prediction, reference


def _directed(source, target, spacing):
    """Distances in mm (N,), in any order, from the N voxels of `source` to the nearest voxel of `target`.

    Shared voxels are at 0 and need no search: half of them if the masks are alike. A distance transform is as
    fast on a small box, but one stray voxel makes the box large; a k-d tree is not affected.
    """
    unshared = np.argwhere(source & ~target) * spacing
    distances = np.zeros(np.count_nonzero(source))
    # Voxel centres are spread evenly by nature: a balanced tree costs more to build than it saves.
    tree = cKDTree(np.argwhere(target) * spacing, balanced_tree=False, compact_nodes=False)
    distances[: len(unshared)] = tree.query(unshared)[0]  # their order does not matter
    return distances


# --------------------------------------------------------------------------------------- one case


def score_case(prediction, reference, spacing):
    """Scores of the labels of one case and phase (X, Y, Z) with voxels of `spacing` (3,) mm, by region.

    Returns {region: {each of SCORES: number}}. If neither has a region, all are NaN except the volumes, which
    are 0. If only one has it, Dice is 0 and distances are NaN, which makes it a failure.
    """
    scores = {}
    for region, label in LABELS.items():
        masks = [np.asarray(labels) == label for labels in (prediction, reference)]
        values = dice(*masks), *surface_distances(*masks, spacing), *(volume_ml(m, spacing) for m in masks)
        scores[region] = dict(zip(SCORES, values))
    return scores


def paper_dice(probabilities, reference):
    """Soft Dice of softmax (C, X, Y, Z) and labels (X, Y, Z), averaged over the slices, by region.

    (2 sum py) / (sum p + sum y + 1e-6) for each of the Z slices: one without the region counts as about 0,
    even if the prediction is right. We assume that this is what the paper reports.
    """
    if probabilities.shape[1:] != reference.shape:
        raise ValueError(f"probabilities {probabilities.shape} do not fit labels {reference.shape}")
    scores = {}
    for region, label in LABELS.items():
        p, y = probabilities[label], reference == label
        both = np.sum(p, axis=(0, 1), where=y, dtype=float)  # (Z,)
        total = np.sum(p, axis=(0, 1), dtype=float) + np.count_nonzero(y, axis=(0, 1))
        scores[region] = float(np.mean(2 * both / (total + 1e-6)))
    return scores


def largest_component(labels):
    """Labels (X, Y, Z) in which each region keeps its largest connected component; the rest is 0.

    Connected by faces, in 3-D, each region by itself; of components of equal size, the first in scan order.
    """
    labels = np.asarray(labels)
    kept = np.zeros_like(labels)
    for label in LABELS.values():
        components, count = ndimage.label(labels == label)
        if count:
            largest = 1 + np.argmax(np.bincount(components.ravel())[1:])  # 0 is what is outside the region
            kept[components == largest] = label
    return kept


def ejection_fraction(edv, esv):
    """Ejection fraction in percent from the volumes at ED and ES; NaN where EDV is 0 or NaN."""
    return float(100 * (edv - esv) / edv) if edv else np.nan


# ----------------------------------------------------------------------------------- over patients


def bootstrap_interval(differences, confidence=0.95, resamples=10_000, seed=0):
    """Percentile bootstrap interval (low, high) of the mean of `differences` (N,), one per patient.

    Patients are drawn with replacement, never slices or phases: those of one patient are not independent
    (Efron & Tibshirani, 1993). (NaN, NaN) for fewer than two patients.
    """
    differences = np.asarray(differences, float)
    if len(differences) < 2:
        return np.nan, np.nan
    drawn = np.random.default_rng(seed).integers(len(differences), size=(resamples, len(differences)))
    tail = 50 * (1 - confidence)
    low, high = np.percentile(differences[drawn].mean(axis=1), [tail, 100 - tail])
    return float(low), float(high)


def paired_comparison(first, second):
    """Compare two models on the same patients; `first` and `second` map a patient to a mean score.

    Returns mean_difference (second minus first), low and high (its 95 % bootstrap interval), p (two-sided
    Wilcoxon signed-rank test; 1 if no patient differs) and n, the patients with a number in both;
    all but n are NaN if n is 0.
    """
    from scipy.stats import wilcoxon  # here, since its import takes half a second

    patients = sorted(first.keys() & second.keys())  # the bootstrap draws by position: a fixed order
    differences = np.array([second[patient] - first[patient] for patient in patients], float)
    differences = differences[~np.isnan(differences)]
    mean, p, n = np.nan, np.nan, len(differences)
    low, high = bootstrap_interval(differences)
    if n:
        mean = float(differences.mean())
        p = float(wilcoxon(differences).pvalue) if differences.any() else 1.0  # scipy needs a difference
    return {"mean_difference": mean, "low": low, "high": high, "p": p, "n": n}


def agreement(measured, reference):
    """Agreement of two measurements (N,) of the same quantity; pairs with a NaN are left out.

    Returns bias (mean of measured minus reference), loa_low and loa_high (Bland & Altman's limits of
    agreement, Lancet 1986: bias +- 1.96 SD of the differences, n - 1 degrees of freedom), r (Pearson), mae
    (mean absolute error) and n; what too few or constant numbers leave undefined is NaN.
    """
    measured, reference = np.asarray(measured, float), np.asarray(reference, float)
    if measured.shape != reference.shape:
        raise ValueError(f"{measured.shape} measurements for {reference.shape} references")
    known = ~np.isnan(measured) & ~np.isnan(reference)
    measured, reference = measured[known], reference[known]
    difference, n = measured - reference, len(measured)
    bias, mae = (float(each.mean()) if n else np.nan for each in (difference, np.abs(difference)))
    spread = 1.96 * float(difference.std(ddof=1)) if n > 1 else np.nan
    varies = n > 1 and np.ptp(measured) > 0 and np.ptp(reference) > 0
    r = float(np.corrcoef(measured, reference)[0, 1]) if varies else np.nan
    return {"bias": bias, "loa_low": bias - spread, "loa_high": bias + spread, "r": r, "mae": mae, "n": n}
