"""Propagated labels against the phantom's truth in every frame, and how well trust predicts their errors.

    python experiments/phantom_truth.py --out experiments/runs/truth --seeds 3

For every seed and recipe, and for `strong` without refining velocities on their own images: register,
propagate, and score every slice of the frames between ED and ES on its case's own grid. Rows already in
OUT/slices.csv are not redone. Ends with two tables, of the slices that each recipe keeps and of those that
all keep, mean over seeds (and standard deviation): Dice in 3-D; the error (1 - Dice) of the 80 % most trusted
slices and of the rest; Spearman's correlation of a slice's true Dice with its confidence, its place (nearness
to the middle of the labelled slices) and the area of its label.
"""

import numpy as np
from common import call, make_parser, over_seeds, phantom_in, results
from scipy.stats import spearmanr

import propagate_labels
import train_registration
from cardiac import LABELS, REGIONS
from cardiac.cache import open_cache
from cardiac.evaluation import aligned
from cardiac.files import read_csv
from cardiac.metrics import dice
from cardiac.phantom import true_labels
from cardiac.propagation import Propagated
from cardiac.settings import PropagationSettings, parse

COLUMNS = ("seed", "recipe", "case", "frame", "slice", "kept", "confidence", "place", "area_mm2", "dice",
           *(f"{kind}_{region}" for region in REGIONS for kind in ("both", "either")))

# name in the tables: recipe, options of the propagation
RECIPES = {
    "paper": ("paper", []),
    "strong, --refine 0": ("strong", ["--refine", 0]),
    "strong": ("strong", []),
}


def run(out, data, args, seed, recipe):
    """Register and propagate; returns rows of slices.csv."""
    recipe, propagation = RECIPES[recipe]
    folder = out / f"seed{seed}" / recipe
    common = ["--data", data, "--cache", out / f"cache-{recipe}", "--out", folder]
    grid = ["--size", args.size, "--spacing", args.spacing]
    steps = ["--seed", seed, "--recipe", recipe, "--max-steps", args.steps]
    call(train_registration, *common, *grid, *steps)
    call(propagate_labels, *common, *propagation, "--overwrite")
    settings = parse(PropagationSettings, [str(word) for word in common], None, earlier=("registration",))
    return score(folder, open_cache(settings))


def score(folder, cache):
    """Score the propagated labels of a run, slice by slice, against the truth."""
    propagated, rows = Propagated.read(folder / "propagation" / "labels.h5"), []
    quality = {
        (r["case"], int(r["frame"]), int(r["slice"])): r
        for r in read_csv(folder / "propagation" / "quality.csv")
    }
    for case in [case for case in cache.split("Training") if case.labelled]:
        labels = propagate_labels.on_own_grid(cache, case, propagated)
        truth = true_labels(cache.root, case.code)
        shown = np.flatnonzero(truth[..., case.ed].any((0, 1)))
        pixel = case.spacing[0] * case.spacing[1]
        for (code, frame, z), row in quality.items():
            if code == case.code and row["source"]:
                found, true = labels[..., z, frame], truth[..., z, frame]
                pairs = {region: (found == label, true == label) for region, label in LABELS.items()}
                line = {"case": code, "frame": frame, "slice": z, "kept": row["kept"]}
                line |= {"confidence": row["confidence"], "place": abs(z - shown.mean())}
                line |= {"area_mm2": float((found > 0).sum() * pixel)}
                line["dice"] = float(np.nanmean([dice(*pair) for pair in pairs.values()]))
                for region, (one, other) in pairs.items():
                    line[f"both_{region}"] = int((one & other).sum())
                    line[f"either_{region}"] = int(one.sum() + other.sum())
                rows.append(line)
    return rows


def volume_dice(rows):
    """Dice in 3-D by region, mean over cases and frames, of the slices kept."""
    sums = {}
    for row in rows:
        if row["kept"] == "1":
            counts = [[int(row[f"{kind}_{region}"]) for region in REGIONS] for kind in ("both", "either")]
            sums[row["case"], row["frame"]] = sums.get((row["case"], row["frame"]), 0) + np.array(counts)
    both, either = np.array(list(sums.values())).transpose(1, 0, 2)
    return np.nanmean(2 * both / np.where(either, either, np.nan), 0)


def trust_against_truth(rows):
    """[error of the 80 % most trusted kept slices, of the rest, Spearman with confidence, place, area]."""
    kept = [row for row in rows if row["kept"] == "1" and row["dice"]]
    confidence, place, area, true = (
        np.array([float(r[n]) for r in kept]) for n in ("confidence", "place", "area_mm2", "dice")
    )
    order = np.argsort(-confidence, kind="stable")
    split = int(0.8 * len(order))
    errors = [1 - true[order[:split]].mean(), 1 - true[order[split:]].mean()]
    return [*errors, *(spearmanr(each, true).statistic for each in (confidence, -place, area))]


def kept_by_all(rows):
    """The rows of slices that every recipe of their seed keeps."""
    keepers = {}
    for row in rows:
        if row["kept"] == "1":
            place = row["seed"], row["case"], row["frame"], row["slice"]
            keepers.setdefault(place, []).append(row)
    recipes = {row["recipe"] for row in rows}
    return [row for found in keepers.values() if len(found) == len(recipes) for row in found]


def print_results(rows):
    """Print the table of the slices that each recipe keeps, and that of those that all keep."""
    for what, chosen in (("a recipe keeps", rows), ("every recipe keeps", kept_by_all(rows))):
        print(f"\nslices that {what}:")
        print_table(chosen)


def print_table(rows):
    """Print a table with one row per recipe."""
    table = [["recipe", "slices", "kept", *REGIONS, "mean", "error of 80 % most trusted", "of the rest",
              "Spearman: trust", "place", "area"]]
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        lines = []
        for seed in dict.fromkeys(row["seed"] for row in rows):
            own = [row for row in rows if (row["recipe"], row["seed"]) == (recipe, seed)]
            regions = volume_dice(own)
            kept = sum(row["kept"] == "1" for row in own)
            lines.append([len(own), kept, *regions, np.mean(regions), *trust_against_truth(own)])
        columns = list(zip(*lines))
        table.append([recipe, *(f"{np.mean(c):.0f}" for c in columns[:2]), *map(over_seeds, columns[2:])])
    print(aligned(table, markdown=True))


def main():
    parser = make_parser(__doc__, "truth", data=False, seeds=3, size=112, spacing=1.4, steps=2500)
    args = parser.parse_args()
    data = phantom_in(args.out / "phantom")
    jobs = [{"seed": seed, "recipe": recipe} for seed in range(args.seeds) for recipe in RECIPES]
    path = args.out / "slices.csv"
    print_results(results(path, COLUMNS, jobs, lambda **job: run(args.out, data, args, **job), args))


if __name__ == "__main__":
    main()
