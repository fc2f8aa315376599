"""How well trust predicts whether a carried pixel is right, and the constants of `cardiac/trust.py`.

    python train_registration.py --data ACDC --out runs/ed --recipe strong --labelled-phases ED
    python experiments/trust_scales.py --data ACDC --out runs/ed

ED's label is carried to ES by the registration in OUT and compared with the expert's, pixel by pixel within a
few pixels of the carried label, in the cases of one split. Prints the maximum-likelihood scale of the image
difference, with trust as the probability of being right; how often pixels are right, by their trust; the Dice
of slices from base to apex; and how often the outermost slice that shows a region at ED has lost it at ES.
Use it on cases whose ES labels the registration never saw.
"""

import dataclasses

import numpy as np
import torch
from common import make_parser
from scipy.optimize import minimize_scalar

from cardiac import LABELS, propagation, trust
from cardiac.cache import open_cache
from cardiac.evaluation import aligned
from cardiac.losses import box_mean
from cardiac.metrics import dice
from cardiac.run import choose_device
from cardiac.settings import PropagationSettings, parse
from cardiac.slices import SliceStore


def carried_pixels(network, cache, case, device, steps):
    """Columns residual, trust and right (0 or 1) of a case's pixels; rows of its slices, from the base on:
    Dice of each region, and whether the expert has no RV where one was carried (NaN if none was); and
    (end, region, whether it is gone at ES) of its outermost slices.
    """
    store = SliceStore(cache, [dataclasses.replace(case, withheld=())], device, None)
    (case,) = store.cases
    carried = propagation.carry(network, store, case.ed, [case.es], steps)
    regions, certainty, _ = trust.fuse({"ED": carried}, {"ED": torch.zeros(1, device=device)})
    found, expert = propagation.harden(regions)[0], store.expert(case, case.es)
    near = box_mean((carried.regions[0].sum(1) > 0.05).float(), window=5) > 0
    near &= carried.present[:, None, None]
    columns = (carried.residual[0], certainty[0], (found == expert).float())
    pixels = torch.stack([column[near] for column in columns]).cpu().numpy()
    found, expert = found.cpu().numpy(), expert.cpu().numpy()
    shown = carried.present.nonzero().flatten().tolist()
    if not shown:
        return pixels, [], []
    if not trust.base_first(carried.pixels.tolist()):
        shown.reverse()
    slices = []
    for z in shown:
        scores = [dice(found[z] == label, expert[z] == label) for label in LABELS.values()]
        rv = [(labels[z] == LABELS["RV"]).any() for labels in (found, expert)]
        slices.append([*scores, float(not rv[1]) if rv[0] else np.nan])
    outermost = []
    for z, region in trust.loss_probability(carried.pixels).nonzero().tolist():
        first = next(each for each in shown if carried.pixels[each, region])
        outermost.append(("base" if z == first else "apex", region, not (expert[z] == region + 1).any()))
    return pixels, slices, outermost


def likeliest_scale(residual, certainty, right):
    """The residual's maximum-likelihood scale, with the resulting trust as the probability of `right`."""
    rest = certainty * np.exp(residual / trust.RESIDUAL_SCALE)

    def negative_log_likelihood(scale):
        log_p = np.log(rest.clip(1e-6)) - residual / scale
        return -np.where(right > 0, log_p, np.log(-np.expm1(np.minimum(log_p, -1e-6)))).mean()

    return minimize_scalar(negative_log_likelihood, bounds=(0.1, 10), method="bounded").x


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--split", default="Training", choices=("Training", "Validation", "Testing"))
    args, others = parser.parse_known_args()
    typed = ["--data", str(args.data), "--out", str(args.out), *others]
    settings = parse(PropagationSettings, typed, None, earlier=("registration",))
    device, cache = choose_device(settings.device), open_cache(settings)
    network, _ = propagation.load_registration(settings.out, device)
    cases = [case for case in cache.split(args.split) if case.labelled]
    if not cases:
        raise SystemExit(f"{settings.data}: no labelled case in {args.split}; choose another --split")
    steps = settings.refine
    columns, stacks, outermost = zip(*(carried_pixels(network, cache, case, device, steps) for case in cases))
    residual, certainty, right = np.concatenate(columns, 1).astype(float)
    print(
        f"{len(cases)} cases, {right.size} pixels near the carried labels, {100 * right.mean():.1f} % right"
    )
    scale = likeliest_scale(residual, certainty, right)
    print(f"maximum-likelihood scale of the residual: {scale:.2f}; in use {trust.RESIDUAL_SCALE}")
    edges = np.quantile(certainty, np.linspace(0, 1, 6))
    fifth = np.searchsorted(edges[1:-1], certainty)
    lines = [["fifth of the pixels, by trust", "mean trust", "right"]]
    for k in range(5):
        lines.append([f"{k + 1}", f"{certainty[fifth == k].mean():.2f}", f"{right[fifth == k].mean():.2f}"])
    print("\n" + aligned(lines, markdown=True) + "\n")
    lines = [["slice, from the base", "slices", *LABELS, "RV gone"]]
    for k in range(max(map(len, stacks))):
        rows = np.array([stack[k] for stack in stacks if len(stack) > k], float)
        means = [np.nanmean(column) if np.isfinite(column).any() else np.nan for column in rows.T]
        lines.append([f"{k + 1}", f"{len(rows)}", *(f"{mean:.2f}" for mean in means)])
    print(aligned(lines, markdown=True) + "\n")
    lines = [["gone at ES from the outermost slice", *LABELS]]
    for end, used in trust.GONE_AT_ES.items():
        gone = [[lost for found in outermost for e, r, lost in found if (e, r) == (end, k)] for k in range(3)]
        lines.append([end, *(f"{np.mean(each):.2f} (in use {u:.2f})" for each, u in zip(gone, used))])
    print(aligned(lines, markdown=True))


if __name__ == "__main__":
    main()
