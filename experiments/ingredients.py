"""What each ingredient of the strong registration is worth: added one at a time, at equal steps.

    python experiments/ingredients.py --data DATA --out experiments/runs/ingredients

Every line of the table is a run of train_registration.py; its quality.csv gives the Dice of ED's label
carried to ES, in 3-D on each case's own grid, mean over regions and cases of Validation and of Testing (and
its standard deviation over seeds), and the largest share of folded pixels near the heart. Runs that are
already in OUT/runs.csv are not repeated.
"""

import re

import numpy as np
from common import call, make_parser, over_seeds, results

import train_registration
from cardiac import REGIONS
from cardiac.evaluation import aligned
from cardiac.files import read_csv

COLUMNS = ("name", "seed", "split", *REGIONS, "mean", "folding_percent")
AUGMENTED = ("--crop", "motion", "--augment", "--averaging", "0.998")
LABELLED = (*AUGMENTED, "--dice-weight", "0.5")
RUNS = {  # from `paper` to `strong`, each adds options to the one before
    "paper": (),
    "and crop about what moves": AUGMENTED[:2],
    "and augmentation, averaged weights": AUGMENTED,
    "and Dice weight 0.5": LABELLED,
    "and guided by the labels": (*LABELLED, "--guided"),
    "and squared difference of the labels": (*LABELLED, "--guided", "--difference-weight", "20"),
    "and turned by 180 degrees = strong": ("--recipe", "strong"),
    "strong, twice the channels": ("--recipe", "strong", "--width", "2"),
    "strong, steps in bfloat16": ("--recipe", "strong", "--precision", "bfloat16"),
    "strong, local NCC for the image": ("--recipe", "strong", "--similarity", "ncc", "--smoothness", "1"),
}


def scores(folder):
    """{split: row} of a run's quality.csv."""
    rows = read_csv(folder / "registration" / "quality.csv")
    found = {}
    for split in ("Validation", "Testing"):
        own = [row for row in rows if row["split"] == split]
        by_region = [
            [float(r["dice_after"] or "nan") for r in own if r["region"] == name] for name in REGIONS
        ]
        means = [np.nanmean(values) for values in by_region]
        folding = max(float(row["folding_percent"]) for row in own)
        found[split] = {**dict(zip(REGIONS, means)), "mean": np.mean(means), "folding_percent": folding}
    return found


def main():
    parser = make_parser(__doc__, "ingredients", seeds=1, size=96, spacing=1.5, steps=2000)
    args = parser.parse_args()

    def run(name, seed):
        folder = args.out / f"seed{seed}" / re.sub(r"\W+", "-", name)
        cache = args.out / ("cache-centre" if name == "paper" else "cache-motion")
        common = ["--data", args.data, "--cache", cache, "--out", folder, "--seed", seed]
        grid = ["--size", args.size, "--spacing", args.spacing, "--max-steps", args.steps]
        call(train_registration, *common, *grid, *RUNS[name])
        return [{"split": split, **row} for split, row in scores(folder).items()]

    jobs = [{"name": name, "seed": seed} for seed in range(args.seeds) for name in RUNS]
    rows = results(args.out / "runs.csv", COLUMNS, jobs, run, args)
    lines = [
        ["registration", "Validation", *(f"Testing {name}" for name in (*REGIONS, "mean")), "folding, %"]
    ]
    for name in RUNS:
        own = {
            split: [r for r in rows if (r["name"], r["split"]) == (name, split)]
            for split in ("Validation", "Testing")
        }
        columns = [("Validation", "mean"), *(("Testing", column) for column in (*REGIONS, "mean"))]
        cells = [over_seeds([float(row[column]) for row in own[split]]) for split, column in columns]
        worst = max(float(row["folding_percent"]) for row in own["Testing"])
        lines.append([name, *cells, f"{worst:.3f}"])
    print(aligned(lines, markdown=True))


if __name__ == "__main__":
    main()
