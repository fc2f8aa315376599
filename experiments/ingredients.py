"""What each ingredient of the strong registration is worth: one more at a time, at equal steps.

    python experiments/ingredients.py --data DATA --out experiments/runs/ingredients

Every line of the table is a run of train_registration.py; its quality.csv gives the Dice of ED's label
carried to ES, in 3-D on each case's own grid, mean over regions and cases of Validation and of Testing (and
its standard deviation over seeds), and the largest share of folded pixels near the heart. Runs that are in
OUT/runs.csv already are not made again.
"""

import argparse
from pathlib import Path

import numpy as np
from common import call

import train_registration
from cardiac import REGIONS
from cardiac.evaluation import aligned
from cardiac.files import read_csv, write_csv

COLUMNS = ("name", "seed", "split", *REGIONS, "mean", "folding_percent")
AUGMENTED = ("--crop", "motion", "--augment", "--averaging", "0.998")
RUNS = {  # each with the words of the one before it, from `paper` to `strong`
    "paper": (),
    "and crop about what moves": AUGMENTED[:2],
    "and augmentation, averaged weights": AUGMENTED,
    "and Dice weight 0.5": (*AUGMENTED, "--dice-weight", "0.5"),
    "and guided by the labels": (*AUGMENTED, "--dice-weight", "0.5", "--guided"),
    "and squared difference of the labels = strong": ("--recipe", "strong"),
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


def over_seeds(values):
    """A mean in words, with the standard deviation over seeds where there are several."""
    spread = f" ({np.std(values, ddof=1):.3f})" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="dataset in the layout of M&Ms or ACDC")
    parser.add_argument("--out", type=Path, default=Path("experiments/runs/ingredients"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--size", type=int, default=96, help="pixels")
    parser.add_argument("--spacing", type=float, default=1.5, help="mm")
    parser.add_argument("--steps", type=int, default=2000)
    words = parser.parse_args()
    path = words.out / "runs.csv"
    rows = read_csv(path) if path.exists() else []
    for seed in range(words.seeds):
        for number, (name, more) in enumerate(RUNS.items()):
            if (name, str(seed)) in {(row["name"], row["seed"]) for row in rows}:
                continue
            folder = words.out / f"seed{seed}" / str(number)
            cache = words.out / ("cache-centre" if name == "paper" else "cache-motion")
            common = ["--data", words.data, "--cache", cache, "--out", folder, "--seed", seed]
            grid = ["--size", words.size, "--spacing", words.spacing, "--max-steps", words.steps]
            call(train_registration, *common, *grid, *more)
            found = scores(folder)
            rows += [{"name": name, "seed": seed, "split": split, **row} for split, row in found.items()]
            write_csv(path, COLUMNS, rows)
            rows = read_csv(path)
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
