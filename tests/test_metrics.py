"""Metrics against hand-made examples, all pairs of voxels, closed forms, scipy, and MONAI where installed."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats

from cardiac import REGIONS
from cardiac import metrics as m

SPACING = (1.5, 1.25, 10.0)


def mask_of(shape, *voxels):
    mask = np.zeros(shape, bool)
    for voxel in voxels:
        mask[voxel] = True
    return mask


def blob(rng, shape, threshold=0.5):
    """A random smooth mask, often in several pieces and touching the border, never empty."""
    field = ndimage.gaussian_filter(rng.standard_normal(shape), (1.5, 1.5, 0.7))
    mask = field > threshold * field.std()
    mask[tuple(rng.integers(shape))] = True
    return mask


def brute_force(first, second, spacing):
    """HD95, ASSD and the mean of the two directed means, voxel by voxel and by all pairs; slow and simple."""

    def surface(mask):
        points = []
        for voxel in np.argwhere(mask):
            for step in np.vstack([np.eye(3, dtype=int), -np.eye(3, dtype=int)]):
                neighbour = voxel + step
                outside = (neighbour < 0).any() or (neighbour >= mask.shape).any()
                if outside or not mask[tuple(neighbour)]:
                    points.append(voxel * np.array(spacing))
                    break
        return np.array(points)

    a, b = surface(first), surface(second)
    pairs = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    forth, back = pairs.min(1), pairs.min(0)
    hd95 = max(np.percentile(forth, 95), np.percentile(back, 95))
    return hd95, (forth.sum() + back.sum()) / (len(a) + len(b)), (forth.mean() + back.mean()) / 2


# ------------------------------------------------------------------------------- one pair of masks


def test_dice_by_hand():
    a, b = mask_of((4,), slice(0, 3)), mask_of((4,), slice(2, 4))
    empty = np.zeros(4, bool)
    assert m.dice(a, b) == pytest.approx(2 * 1 / (3 + 2))
    assert m.dice(a, a) == 1
    assert m.dice(a, empty) == m.dice(empty, a) == 0
    assert math.isnan(m.dice(empty, empty))


@pytest.mark.parametrize("function", [m.dice, lambda a, b: m.surface_distances(a, b, SPACING)])
def test_shapes_that_would_broadcast_are_refused(function):
    with pytest.raises(ValueError, match="differ in shape"):
        function(np.ones((2, 3, 4), bool), np.ones((1, 3, 4), bool))


def test_surface_distances_want_three_dimensions():
    with pytest.raises(ValueError, match="3-D"):
        m.surface_distances(np.ones((2, 3), bool), np.ones((2, 3), bool), (1, 1, 1))
    with pytest.raises(ValueError, match="three spacings"):
        m.surface_distances(np.ones((2, 3, 4), bool), np.ones((2, 3, 4), bool), (1, 1))


def test_surface_distances_of_empty_masks_are_undefined():
    some, empty = mask_of((3, 3, 3), (1, 1, 1)), np.zeros((3, 3, 3), bool)
    for pair in [(some, empty), (empty, some), (empty, empty)]:
        assert all(math.isnan(value) for value in m.surface_distances(*pair, SPACING))


@pytest.mark.parametrize(
    ("voxel", "distance"), [((3, 0, 0), 4.5), ((0, 2, 0), 2.5), ((0, 0, 1), 10), ((2, 0, 1), math.sqrt(109))]
)
def test_single_voxels_are_apart_by_the_spacing(voxel, distance):
    a, b = mask_of((5, 5, 5), (0, 0, 0)), mask_of((5, 5, 5), voxel)
    assert m.surface_distances(a, b, SPACING) == pytest.approx((distance, distance))


def test_shifted_cubes():
    """5x5x5 cubes one voxel apart along x: worked out on paper.

    Of the 98 surface voxels of each, 25 (the far face) are one voxel from the other's surface; 9 inside the
    near face lie in the other's interior, one voxel from its near face too; the other 64 are shared.
    """
    a = mask_of((12, 9, 9), np.s_[2:7, 2:7, 2:7])
    b = mask_of((12, 9, 9), np.s_[3:8, 2:7, 2:7])
    hd95, assd = m.surface_distances(a, b, (2.0, 3.0, 4.0))
    assert hd95 == 2
    assert assd == pytest.approx(2 * (25 + 9) / 98)


def test_the_array_ends_where_the_background_begins():
    full, hollow = np.ones((5, 5, 5), bool), np.ones((5, 5, 5), bool)
    hollow[2, 2, 2] = False  # its surface: the border's 98 voxels and the six around the hole
    hd95, assd = m.surface_distances(hollow, full, (1, 1, 1))
    assert hd95 == pytest.approx(np.percentile([0] * 98 + [1] * 6, 95))
    assert assd == pytest.approx(6 / (98 + 104))


@pytest.mark.parametrize("seed", range(20))
def test_surface_distances_are_those_of_all_pairs(seed):
    rng = np.random.default_rng(seed)
    shape, spacing = rng.integers(3, 12, size=3), rng.uniform(0.5, 10, size=3)
    a, b = blob(rng, shape), blob(rng, shape, threshold=1)
    assert m.surface_distances(a, b, spacing) == pytest.approx(brute_force(a, b, spacing)[:2])


def test_assd_is_not_the_mean_of_the_two_means():
    """A voxel against a bar of three that begins there: distances 0 | 0, 1, 2; so 3/4, not (0 + 1) / 2."""
    one, bar = mask_of((3, 1, 1), 0), mask_of((3, 1, 1), slice(None))
    assert m.surface_distances(one, bar, (1, 1, 1))[1] == 0.75
    assert brute_force(one, bar, (1, 1, 1))[1:] == (0.75, 0.5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.tuples(*[st.integers(1, 8)] * 3), st.tuples(*[st.floats(0.5, 12)] * 3))
def test_properties_of_surface_distances(seed, shape, spacing):
    rng = np.random.default_rng(seed)
    a, b = blob(rng, shape), blob(rng, shape)
    hd95, assd = m.surface_distances(a, b, spacing)
    diagonal = np.linalg.norm((np.array(shape) - 1) * spacing)
    assert 0 <= hd95 <= diagonal + 1e-9
    assert 0 <= assd <= diagonal + 1e-9
    assert m.surface_distances(b, a, spacing) == pytest.approx((hd95, assd))
    assert m.surface_distances(a, a, spacing) == (0, 0)
    assert m.dice(a, b) == m.dice(b, a)
    assert 0 <= m.dice(a, b) <= 1
    wider = [np.pad(mask, ((2, 0), (0, 3), (1, 1))) for mask in (a, b)]
    assert m.surface_distances(*wider, spacing) == pytest.approx((hd95, assd))
    scaled = m.surface_distances(a, b, 2 * np.array(spacing))
    assert scaled == pytest.approx((2 * hd95, 2 * assd))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.tuples(*[st.integers(1, 6)] * 3), st.tuples(*[st.floats(0.5, 12)] * 3))
def test_scores_of_a_case_have_bounds_and_symmetries(seed, shape, spacing):
    rng = np.random.default_rng(seed)
    one, other = (rng.integers(0, rng.integers(1, 5), shape).astype(np.uint8) for _ in range(2))
    scores, swapped = m.score_case(one, other, spacing), m.score_case(other, one, spacing)
    mirrored = m.score_case(one[::-1, :, ::-1], other[::-1, :, ::-1], spacing)
    turned = m.score_case(one.swapaxes(0, 1), other.swapaxes(0, 1), [spacing[k] for k in (1, 0, 2)])
    volume = one.size * np.prod(spacing) / 1000
    for region, found in scores.items():
        assert mirrored[region] == pytest.approx(found, nan_ok=True)
        assert turned[region] == pytest.approx(found, nan_ok=True)
        back = {"volume_ml": found["reference_volume_ml"], "reference_volume_ml": found["volume_ml"]}
        assert swapped[region] == pytest.approx({**found, **back}, nan_ok=True)
        assert math.isnan(found["dice"]) or 0 <= found["dice"] <= 1
        assert 0 <= found["volume_ml"] <= volume * (1 + 1e-9)
    certain = np.stack([one == label for label in range(4)]).astype(float)
    blurred = 0.5 * certain + 0.125
    for region, dice in m.paper_dice(blurred, one).items():
        assert 0 <= dice <= m.paper_dice(certain, one)[region] <= 1


def monai_distances(prediction, reference, spacing):
    """HD95 and ASSD by MONAI; skips the test where it is not installed."""
    pytest.importorskip("monai")
    import torch
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    masks = [torch.from_numpy(mask)[None, None] for mask in (prediction, reference)]
    options = {"include_background": True, "spacing": [float(step) for step in spacing]}
    hd95 = compute_hausdorff_distance(*masks, percentile=95, **options)
    assd = compute_average_surface_distance(*masks, symmetric=True, **options)
    return hd95.item(), assd.item()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_surface_distances_agree_with_monai():
    """200 random pairs. MONAI 1.6.1 has our definitions; what is left is the rounding of its float32."""
    rng = np.random.default_rng(0)
    worst = 0
    for _ in range(200):
        shape = rng.integers((4, 4, 2), (40, 40, 13))
        spacing = rng.uniform((0.8, 0.8, 5), (1.8, 1.8, 10))
        a, b = blob(rng, shape), blob(rng, shape, threshold=rng.uniform(0, 2))
        ours, theirs = m.surface_distances(a, b, spacing), monai_distances(a, b, spacing)
        worst = max(worst, np.abs(np.subtract(ours, theirs)).max())
    assert worst < 1e-3  # mm


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_an_empty_mask_is_where_monai_differs():
    """MONAI's ASSD is infinite there and would spoil every mean; ours is NaN, a failure to be counted."""
    some, empty = mask_of((3, 3, 3), (1, 1, 1)), np.zeros((3, 3, 3), bool)
    assert monai_distances(empty, some, SPACING) == pytest.approx((math.nan, math.inf), nan_ok=True)
    assert m.surface_distances(empty, some, SPACING) == pytest.approx((math.nan, math.nan), nan_ok=True)


def test_volume():
    assert m.volume_ml(mask_of((10, 10, 4), np.s_[:5, :4, :2]), (1.5, 2, 10)) == pytest.approx(40 * 30 / 1000)
    assert m.volume_ml(np.zeros((2, 2, 2), bool), SPACING) == 0


# ---------------------------------------------------------------------------------------- one case


def test_score_case_with_regions_that_one_or_both_lack():
    prediction, reference = np.zeros((6, 6, 3), np.uint8), np.zeros((6, 6, 3), np.uint8)
    prediction[1:3, 1:3, 1] = reference[1:3, 1:4, 1] = 1  # LV: 4 and 6 voxels
    reference[5, 5, :] = 2  # MYO: only in the reference; RV in neither
    scores = m.score_case(prediction, reference, (1.0, 2.0, 10.0))
    assert tuple(scores) == REGIONS
    lv = {"dice": 0.8, "hd95_mm": 2, "assd_mm": 0.4, "volume_ml": 0.08, "reference_volume_ml": 0.12}
    assert scores["LV"] == pytest.approx(lv)
    nan = math.nan
    myo = {"dice": 0, "hd95_mm": nan, "assd_mm": nan, "volume_ml": 0, "reference_volume_ml": 0.06}
    assert scores["MYO"] == pytest.approx(myo, nan_ok=True)
    rv = {"dice": nan, "hd95_mm": nan, "assd_mm": nan, "volume_ml": 0, "reference_volume_ml": 0}
    assert scores["RV"] == pytest.approx(rv, nan_ok=True)
    spurious = m.score_case(reference, prediction, (1.0, 2.0, 10.0))["MYO"]
    assert spurious["dice"] == 0
    assert math.isnan(spurious["hd95_mm"])
    assert spurious["volume_ml"] == pytest.approx(0.06)


def test_score_case_refuses_other_shapes():
    with pytest.raises(ValueError, match="differ in shape"):
        m.score_case(np.zeros((4, 4, 2)), np.zeros((4, 4, 1)), SPACING)


def test_paper_dice_counts_empty_slices_as_nothing():
    reference = np.zeros((2, 2, 2), np.uint8)
    reference[0, :, 0] = 1  # LV: two voxels in slice 0, none in slice 1
    probabilities = np.zeros((4, 2, 2, 2), np.float16)
    probabilities[1, 0, :, 0] = 0.5
    probabilities[1, :, :, 1] = 0.25
    probabilities[0] = 1 - probabilities[1]
    scores = m.paper_dice(probabilities, reference)
    assert scores["LV"] == pytest.approx((2 * 1 / (1 + 2 + 1e-6) + 0) / 2)
    assert scores["MYO"] == scores["RV"] == 0
    assert tuple(scores) == REGIONS


def test_paper_dice_of_a_perfect_prediction():
    reference = np.random.default_rng(0).integers(0, 4, size=(8, 8, 5))
    reference[:, :, 3:] = 0  # two of five slices without a label: three fifths at best
    probabilities = np.stack([reference == label for label in range(4)]).astype(float)
    assert m.paper_dice(probabilities, reference) == pytest.approx(dict.fromkeys(REGIONS, 0.6), abs=1e-6)
    with pytest.raises(ValueError, match="do not fit"):
        m.paper_dice(probabilities, reference[:, :, :1])


def test_largest_component_keeps_one_piece_a_region():
    labels = np.zeros((8, 8, 3), np.uint8)
    labels[1:3, 1:3, :2] = 1  # 8 voxels over two slices: connected through the slices
    labels[5, 5:7, 0] = 1  # apart
    labels[3, 3, 0] = 1  # touches the first only at a corner: apart too
    labels[7, :, 2] = 2
    before = labels.copy()
    kept = m.largest_component(labels)
    expected = labels.copy()
    expected[5, 5:7, 0] = expected[3, 3, 0] = 0
    np.testing.assert_array_equal(kept, expected)
    np.testing.assert_array_equal(labels, before)
    assert kept.dtype == labels.dtype
    assert not m.largest_component(np.zeros((3, 3, 3), np.uint8)).any()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_largest_component_properties(seed):
    labels = np.random.default_rng(seed).integers(0, 4, size=(6, 5, 3)).astype(np.uint8)
    kept = m.largest_component(labels)
    assert set(np.unique(kept[kept != labels])) <= {0}  # takes away, never adds or changes
    np.testing.assert_array_equal(m.largest_component(kept), kept)
    for label in (1, 2, 3):
        components, count = ndimage.label(labels == label)
        sizes = [np.count_nonzero(components == number + 1) for number in range(count)]
        assert np.count_nonzero(kept == label) == max(sizes, default=0)
        assert ndimage.label(kept == label)[1] <= 1


def test_ejection_fraction():
    assert m.ejection_fraction(120, 48) == pytest.approx(60)
    assert m.ejection_fraction(100.0, 110.0) == pytest.approx(-10)
    assert math.isnan(m.ejection_fraction(0, 0))
    assert math.isnan(m.ejection_fraction(np.float64(0), 5.0))
    assert math.isnan(m.ejection_fraction(math.nan, 5.0))
    assert m.MYOCARDIUM_DENSITY == 1.05


# ----------------------------------------------------------------------------------- over patients


def test_bootstrap_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).normal(2, 3, size=400)
    low, high = m.bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.03)
    assert high == pytest.approx(values.mean() + half, abs=0.03)
    narrow = m.bootstrap_interval(values, confidence=0.5)
    assert low < narrow[0] < values.mean() < narrow[1] < high


def test_bootstrap_interval_agrees_with_scipy():
    values = np.random.default_rng(2).exponential(size=30)  # skewed: not the interval of a normal
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000).confidence_interval
    assert m.bootstrap_interval(values) == pytest.approx((theirs.low, theirs.high), abs=0.03)


def test_bootstrap_interval_is_repeatable_and_needs_two_patients():
    values = [1.0, 2.0, 4.0]
    assert m.bootstrap_interval(values) == m.bootstrap_interval(values)
    assert m.bootstrap_interval(values, resamples=50, seed=1) != m.bootstrap_interval(values, resamples=50)
    assert m.bootstrap_interval([3.0, 3.0]) == (3, 3)
    for few in ([], [1.0]):
        assert all(math.isnan(value) for value in m.bootstrap_interval(few))


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(3)
    intervals = [m.bootstrap_interval(rng.normal(size=50), 0.9, 1000, seed) for seed in range(300)]
    covered = np.mean([low <= 0 <= high for low, high in intervals])
    assert 0.83 < covered < 0.95  # 0.90 -+ three standard errors, and a little low by nature


def test_paired_comparison_against_scipy():
    rng = np.random.default_rng(4)
    first = {f"case{number}": value for number, value in enumerate(rng.uniform(0.6, 0.9, size=25))}
    second = {case: value + rng.normal(0.02, 0.03) for case, value in reversed(first.items())}
    result = m.paired_comparison(first, second)
    differences = np.array([second[case] - first[case] for case in sorted(first)])
    assert result["n"] == 25
    assert result["mean_difference"] == pytest.approx(differences.mean())
    assert (result["low"], result["high"]) == m.bootstrap_interval(differences)
    assert result["p"] == pytest.approx(stats.wilcoxon(differences).pvalue)
    swapped = m.paired_comparison(second, first)
    assert swapped["mean_difference"] == pytest.approx(-result["mean_difference"])
    assert swapped["p"] == pytest.approx(result["p"])


def test_paired_comparison_by_hand():
    """Five patients that all gain, by different amounts: 2 of the 2^5 sign patterns are as extreme."""
    result = m.paired_comparison(dict.fromkeys("abcde", 0.0), dict(zip("abcde", [1.0, 2.0, 3.0, 4.0, 5.0])))
    assert result["p"] == pytest.approx(2 / 32)
    assert result["mean_difference"] == 3
    assert 1 < result["low"] < 3 < result["high"] < 5


def test_patients_that_do_not_differ_leave_the_others_their_p():
    gains = dict(zip("abcdef", [1.0, 0.0, 3.0, 4.0, 5.0, 6.0]))
    result = m.paired_comparison(dict.fromkeys(gains, 0.0), gains)
    assert result["p"] == pytest.approx(2 / 32)


def test_paired_comparison_takes_patients_with_two_numbers():
    first = {"a": 0.5, "b": 0.6, "c": math.nan, "d": 0.9}
    second = {"b": 0.7, "c": 0.8, "a": 0.5, "e": 0.1}
    result = m.paired_comparison(first, second)
    assert result["n"] == 2
    assert result["mean_difference"] == pytest.approx(0.05)


def test_paired_comparison_without_a_difference_or_a_patient():
    same = {"a": 0.5, "b": 0.6, "c": 0.7}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        equal = m.paired_comparison(same, same)
        nobody = m.paired_comparison(same, {"x": 1.0})
        alone = m.paired_comparison({"a": 0.5}, {"a": 0.75})
    assert equal == {"mean_difference": 0, "low": 0, "high": 0, "p": 1, "n": 3}
    assert nobody.pop("n") == 0
    assert all(math.isnan(value) for value in nobody.values())
    assert alone["mean_difference"] == 0.25
    assert alone["p"] == 1
    assert math.isnan(alone["low"])


def test_agreement_by_hand():
    result = m.agreement([102, 110, 95, math.nan], [100, 104, 94, 80])
    spread = 1.96 * math.sqrt(((2 - 3) ** 2 + (6 - 3) ** 2 + (1 - 3) ** 2) / 2)
    assert result["n"] == 3
    assert result["bias"] == result["mae"] == pytest.approx(3)
    assert (result["loa_low"], result["loa_high"]) == pytest.approx((3 - spread, 3 + spread))
    assert result["r"] == pytest.approx(stats.pearsonr([102, 110, 95], [100, 104, 94])[0])
    small = m.agreement([0.102, 0.110, 0.095], [0.100, 0.104, 0.094])
    assert small["r"] == pytest.approx(result["r"]), "in any unit"
    assert m.agreement([1, 3], [3, 1])["mae"] == 2
    assert m.agreement([1, 3], [3, 1])["bias"] == 0


def test_agreement_where_it_is_not_defined():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nothing, one = m.agreement([], []), m.agreement([5.0], [4.0])
        constant = m.agreement([1.0, 1.0], [1.0, 2.0])
    assert nothing.pop("n") == 0
    assert all(math.isnan(value) for value in nothing.values())
    assert one["bias"] == one["mae"] == one["n"] == 1
    assert all(math.isnan(one[key]) for key in ("loa_low", "loa_high", "r"))
    assert math.isnan(constant["r"])
    assert not math.isnan(constant["loa_low"])
    with pytest.raises(ValueError, match="references"):
        m.agreement([1.0], [1.0, 2.0])
