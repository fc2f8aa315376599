"""What each ingredient of the strong segmentation is worth: added one at a time, at equal steps.

    python experiments/segmentation_ingredients.py --data DATA --out experiments/runs/segmentation-ingredients

Every line of the table is a U-Net trained on all expert labels by train_segmentation.py and Table 1's row of
it by evaluate.py: Dice on Testing, in 3-D on each case's own grid, by region, by vendor and in total, mean
over seeds (standard deviation). Runs that are already in OUT/runs.csv are not repeated. What `strong` does
with propagated labels (trust, the expert's share) is not in it.
"""

import re

from common import call, make_parser, over_seeds, results

import evaluate
import train_segmentation
from cardiac.evaluation import TABLE, aligned
from cardiac.files import read_csv

MOTION = ("--crop", "motion")
AUGMENTED = (*MOTION, "--augment")
AVERAGED = (*AUGMENTED, "--averaging", "0.99")
WITH_DICE = (*AVERAGED, "--dice-weight", "1")
RUNS = {  # from `paper` to `strong`: options of the training, each with those before it; of evaluate.py
    "paper": ((), ()),
    "and crop about what moves": (MOTION, ()),
    "and augmentation": (AUGMENTED, ()),
    "and averaged weights": (AVERAGED, ()),
    "and soft Dice": (WITH_DICE, ()),
    "and four mirror images = strong": (WITH_DICE, ("--mirrored",)),
}


def main():
    numbers = {"seeds": 1, "size": 96, "spacing": 2.0, "channels": 8, "steps": 600, "steps_per_epoch": 100}
    args = make_parser(__doc__, "segmentation-ingredients", **numbers).parse_args()

    def run(name, seed):
        trained, scored = RUNS[name]
        folder = args.out / f"seed{seed}" / (re.sub(r"\W+", "-", " ".join(trained)).strip("-") or "paper")
        cache = args.out / f"cache-{'motion' if trained else 'centre'}"
        common = ["--data", args.data, "--out", folder, "--cache", cache, "--seed", seed]
        grid = ["--size", args.size, "--spacing", args.spacing, "--channels", args.channels]
        budget = ["--max-steps", args.steps, "--steps-per-epoch", args.steps_per_epoch]
        call(train_segmentation, *common, *grid, *budget, "--labels", "original", *trained)
        call(evaluate, *common, *scored)
        (row,) = read_csv(folder / "evaluation" / "table.csv")
        return [{column: row[column] for column in TABLE[1:]}]

    jobs = [{"name": name, "seed": seed} for seed in range(args.seeds) for name in RUNS]
    rows = results(args.out / "runs.csv", ("name", "seed", *TABLE[1:]), jobs, run, args)
    columns = [column for column in TABLE[1:] if any(row[column] for row in rows)]
    lines = [["segmentation", *columns]]
    for name in RUNS:
        own = [row for row in rows if row["name"] == name]
        lines.append([name, *(over_seeds([float(row[column]) for row in own]) for column in columns)])
    print(aligned(lines, markdown=True))


if __name__ == "__main__":
    main()
