"""How far propagated labels can be trusted: fusion of ED's and ES's, trust per pixel, checks per slice.

Both ends of an interval have an expert label. Carried to a frame in between, they are two nearly independent
guesses: probably right where they agree; where they differ, the one nearer in time is more likely right. The
image difference after warping and the round trip tell the rest: two zero displacements would agree as well,
but then the images do not match.
"""

from itertools import compress

import torch
import torch.nn.functional as F

from cardiac import LABELS
from cardiac.losses import one_hot

RULES_VERSION = 7  # version of the rules: older labels.h5 are redone
# Image difference, as a share of the case's intensity window, at which a label is right e times less often
# than without any; `experiments/trust_scales.py` finds the maximum-likelihood value.
RESIDUAL_SCALE = 1.5
FOLDING_PERCENT = 0.5  # of the pixels near the heart; a slice with more is dropped
OPEN_SHARE = 0.05  # largest share of an enclosed LV's border that is not myocardium
WALL_CHANGE, LV_CHANGE = 0.15, 0.15  # tolerated area change: off interpolation, off neighbours in time
AREA_TOLERANCE_MM2 = 40.0  # tolerated on top of both
# How often the outermost slice with LV, MYO, RV at ED has none at ES, in 70 patients of ACDC.
GONE_AT_ES = {"base": (0.26, 0.26, 0.73), "apex": (0.30, 0.20, 0.43)}


def fuse(carried, nearness):
    """Fuse the labels carried from one or two expert phases to the frames in between, with their trust.

    carried: {phase: `propagation.Carried`}; nearness: {phase: (F,)} from 1 at that phase to 0 at the other.
    Returns regions (F, Z, 3, S, S), trust (F, Z, S, S) in [0, 1] and sources, {phase: (F, Z) bool}: whether a
    slice has its label from that phase.

    A slice labelled at both phases uses both. One labelled at only one of two known phases (the base leaves
    it at an unknown time) uses that phase's label only in the nearer half of the interval, and only until the
    frames look more like the other phase's image (`_still_shown`); its trust falls with time. If ES is
    unknown, a region's share in its outermost slices shrinks with the probability that the heart's shortening
    has drawn it out of the slice by then (`loss_probability`): above one half, it becomes background; a slice
    that shows nothing else has no label left (`faults`).

    A pixel's trust is the share of its label among the guesses, times how well they fit: by the image
    difference after warping, and by the slice's Dice with itself after the round trip. Over phases p:

        fit_p   = exp(-difference_p / RESIDUAL_SCALE) x (round-trip Dice)_p
        w_p     = nearness_p x fit_p
        regions = sum_p w_p regions_p / sum_p w_p
        trust   = (sum_p w_p fit_p / sum_p w_p) x share of the label
    """
    sources = {phase: each.present.expand(len(each.regions), -1) for phase, each in carried.items()}
    if len(carried) == 2:
        for phase, other in zip(carried, reversed(carried)):
            nearer_half = (nearness[phase] >= 0.5)[:, None]
            alone = nearer_half & _still_shown(carried[phase], carried[other], nearness[phase])
            sources[phase] = carried[phase].present & (carried[other].present | alone)
    shares = {phase: each.regions for phase, each in carried.items()}
    if "ES" not in carried:
        gone = loss_probability(carried["ED"].pixels) * (1 - nearness["ED"])[:, None, None]
        shares["ED"] = shares["ED"] * (1 - gone)[..., None, None]
    weights, fits = {}, {}
    for phase, each in carried.items():
        fit = torch.exp(-each.residual / RESIDUAL_SCALE)
        fits[phase] = fit * each.confidence.nan_to_num()[..., None, None]
        near = sources[phase] * nearness[phase][:, None].clamp(min=0.01)
        weights[phase] = near[..., None, None] * fits[phase].clamp(min=1e-6)
    total = sum(weights.values()).clamp(min=1e-12)
    regions = sum(weights[phase][:, :, None] * shares[phase] for phase in carried)
    regions = regions / total[:, :, None]
    fit = sum(weights[phase] * fits[phase] for phase in carried) / total
    trust = fit * torch.maximum(regions.amax(2), 1 - regions.sum(2))
    if len(carried) == 2:
        still_there = sum(sources[phase] * nearness[phase][:, None] for phase in carried)  # one source: base
        trust = trust * torch.where(sources["ED"] & sources["ES"], 1, still_there)[..., None, None]
    return regions, trust, sources


def base_first(pixels):
    """Whether a stack begins at the base, its half with more label, by the pixels (Z, 3) of regions at ED."""
    total = [sum(row) for row in pixels if any(row)]
    half = len(total) // 2
    return sum(total[:half]) >= sum(total[len(total) - half :])


def loss_probability(pixels):
    """The probability (Z, 3) that a slice with a region at ED has lost it at ES; pixels: (Z, 3) at ED.

    The base descends by one to two slices, and the cavities close at the apex. Regions in only one or two
    slices are left alone: of a short stack nothing would remain.
    """
    counts, gone = pixels.tolist(), torch.zeros(pixels.shape)
    ends = ("base", "apex") if base_first(counts) else ("apex", "base")
    for region, column in enumerate(zip(*counts)):
        slices = [z for z, count in enumerate(column) if count]
        if len(slices) > 2:
            for end, z in zip(ends, (slices[0], slices[-1])):
                gone[z, region] = GONE_AT_ES[end][region]
    return gone.to(pixels.device)


def _still_shown(own, other, nearness):
    """Whether (F, Z) a slice still shows what it did at phase `own`, and not yet what it does at the other.

    The base leaves a slice once: up to some frame the image within the label is explained better by this
    phase's image, from then on by the other's. The change is put where the evidence of all frames before it
    is largest. Images are warped by the network alone, since a refined velocity can explain anything.
    """
    evidence = ((other.unrefined - own.unrefined) * own.regions.sum(2)).sum((-2, -1))
    order = nearness.argsort(descending=True)  # away from the phase
    so_far = evidence[order].cumsum(0)
    rank = order.argsort()[:, None]
    return (rank <= so_far.argmax(0)) & (so_far.amax(0) > 0)


def expected_dice(labels, trust):
    """The expected Dice of labels with the truth, if `trust` is the probability that a pixel is right.

    labels, trust: (F, Z, S, S). Returns (F, Z): the mean over the regions shown, NaN if there are none. A
    region is expected to miss the pixels beside it, with other labels, to the degree that those are doubtful.
    """
    regions, trust = one_hot(labels.flatten(0, -3)), trust.flatten(0, -3)[:, None]
    area, right = regions.sum((-2, -1)), (regions * trust).sum((-2, -1))
    beside = F.max_pool2d(regions, 3, 1, 1) - regions
    missed = (beside * (1 - trust)).sum((-2, -1))
    dice = 2 * right / (area + right + missed).clamp(min=1e-6)
    return (dice.sum(1) / (area > 0).sum(1)).view(labels.shape[:-2])


def areas(labels, region, pixel_mm2):
    """Area (...) in mm2 of a region in labels (..., S, S)."""
    return (labels == LABELS[region]).sum((-2, -1)) * pixel_mm2


def enclosed(labels):
    """Whether LV in labels (..., S, S) borders almost only on myocardium; False if there is no LV."""
    lv, wall = (labels == LABELS[name] for name in ("LV", "MYO"))
    border = torch.zeros(labels.shape[:-2], device=labels.device)
    opened = torch.zeros_like(border)
    for axis, shift in ((-1, 1), (-1, -1), (-2, 1), (-2, -1)):
        beside = lv.roll(shift, axis) & ~lv  # hearts do not reach the edge of a slice
        border += beside.sum((-2, -1))
        opened += (beside & ~wall).sum((-2, -1))
    return (border > 0) & (opened <= OPEN_SHARE * border)


def faults(labels, ends, elapsed, folding, given_up, pixel_mm2):
    """What is wrong with labels (F, Z, S, S) of successive frames of an interval: (F, Z) texts, or "".

    ends: the expert labels (Z, S, S) of the interval's start and end, None if unknown; elapsed: (F,) share of
    the interval that has passed; folding: (F, Z) percent; given_up: (F, Z) bool, slices whose label `fuse` no
    longer uses.
    """
    known = torch.stack([end for end in ends if end is not None])
    closed = enclosed(known) | ~(known == LABELS["LV"]).flatten(2).any(2)  # an end without LV is no objection
    source_closed = closed.all(0) & enclosed(known).any(0)
    there = (labels > 0).flatten(2).any(2) & ~given_up
    found = {
        "given up": given_up,
        "folding": folding > FOLDING_PERCENT,
        "no label left": ~there & ~given_up & (known > 0).flatten(2).any(2).any(0),
        "LV open": there & source_closed & ~enclosed(labels),
    }
    if len(known) == 2:
        start, end = (areas(each, "MYO", pixel_mm2) for each in ends)
        expected = torch.lerp(start.float(), end.float(), elapsed[:, None])
        off = (areas(labels, "MYO", pixel_mm2) - expected).abs() > WALL_CHANGE * expected + AREA_TOLERANCE_MM2
        found["wall area"] = off & (start > 0) & (end > 0)
        interval = torch.cat([ends[0][None], labels, ends[1][None]])
        cavity = areas(interval, "LV", pixel_mm2).float()
        middle = (cavity[:-2] + cavity[2:]) / 2
        jumps = (cavity[1:-1] - middle).abs() > LV_CHANGE * cavity.amax(0) + AREA_TOLERANCE_MM2
        found["LV area jumps"] = jumps & (start > 0) & (end > 0)
    return joined_names(found, "; ")


def joined_names(masks, between):
    """The names of the masks {name: (F, Z) bool} that are True, joined in one text each: an (F, Z) list."""
    holding = torch.stack(list(masks.values()), -1).tolist()
    return [[between.join(compress(masks, flags)) for flags in frame] for frame in holding]
