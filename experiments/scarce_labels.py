"""What propagated labels are worth if only ED is labelled: patient-wise folds of one dataset.

    python experiments/scarce_labels.py --data DATA --out experiments/runs/scarce

All labelled patients of DATA are split into folds; each fold tests networks trained on the others. With only
the expert labels of ED (--labelled-phases ED), the registration learns from images and carries them to ES;
`original` (ED) and `propagated` (ED and carried ES) are trained at equal steps, and `bound` on the expert
labels of both. `--patients all 5 10 25` repeats this with only so many labelled patients, the others being
unlabelled, without `bound`; `--seeds N` trains all networks of a fold N times; other options go to both
training scripts. Finished runs are in OUT/cases.csv and are not repeated. Ends with the Dice at ES, and
paired differences with 95 % intervals over patients and seeds.
"""

import csv
import os
from pathlib import Path

import numpy as np
from common import call, dice_of, make_parser, over_seeds, results, with_interval

import evaluate
import propagate_labels
import train_registration
import train_segmentation
from cardiac import REGIONS, evaluation
from cardiac.files import read_csv
from cardiac.layouts import read_cases

COLUMNS = ("seed", "fold", "patients", *evaluation.CASES)


def write_fold(data, root, fold, folds):
    """Lay out a dataset like M&Ms at `root`, of links to `data`: one fold is Testing, the rest Training."""
    dataset = read_cases(data)
    cases = sorted((case for case in dataset.good(False) if case.labels), key=lambda case: case.code)
    order = np.random.default_rng(0).permutation(len(cases))
    for position, k in enumerate(order):
        case = cases[k]
        folder = root / ("Testing" if position % folds == fold else "Training/Labeled") / case.code
        folder.mkdir(parents=True, exist_ok=True)
        for name in case.files:
            link = folder / Path(name).name
            if not link.exists():
                os.symlink((dataset.root / name).resolve(), link)
    with open(root / "folds_opendataset.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("External code", "Vendor", "Centre", "ED", "ES"))
        writer.writerows((case.code, case.vendor, case.centre, case.ed, case.es) for case in cases)
    return root


def run(data, out, patients, seed, args, others):
    """Train and score `original`, `propagated` and, with all patients labelled, `bound` on one fold from one
    seed; returns rows of cases.csv.
    """
    common = ["--data", data, "--cache", data.parent / "cache", "--recipe", args.recipe, "--seed", seed]
    grid = ["--size", args.size, "--spacing", args.spacing]
    few = [] if patients == "all" else ["--labelled-cases", patients]
    budget = ["--max-steps", args.steps, "--steps-per-epoch", 100, "--channels", args.channels, *others]
    carried, bound = out / "carried", out / "bound"
    steps = ["--max-steps", args.registration_steps, *others]
    call(train_registration, *common, *grid, *few, *steps, "--labelled-phases", "ED", "--out", carried)
    call(propagate_labels, *common, "--out", carried)
    call(train_segmentation, *common, *budget, "--out", carried)
    call(evaluate, *common, "--out", carried)
    rows = read_csv(carried / "evaluation" / "cases.csv")
    if few:
        return rows
    call(train_segmentation, *common, *grid, *budget, "--labels", "original", "--out", bound)
    call(evaluate, *common, "--out", bound)
    return rows + [{**row, "model": "bound"} for row in read_csv(bound / "evaluation" / "cases.csv")]


def print_results(rows):
    """Dice at ES by region and model, and the paired differences, for each number of labelled patients."""
    for patients in dict.fromkeys(row["patients"] for row in rows):
        own = [row for row in rows if row["patients"] == patients and row["phase"] == "ES"]
        print(f"\nlabelled patients: {patients}; ES, {len({row['case'] for row in own})} test patients\n")
        models = dict.fromkeys(row["model"] for row in own)
        lines = [["model", *REGIONS, "mean"]]
        for model in models:
            cells = [dice_of(own, model, regions) for regions in (*zip(REGIONS), REGIONS)]
            lines.append([model, *(over_seeds(np.nanmean(cell, 1)) for cell in cells)])
        print(evaluation.aligned(lines, markdown=True))
        pairs = (("propagated", "original"), ("bound", "original"), ("bound", "propagated"))
        for better, worse in (pair for pair in pairs if pair[0] in models):
            difference = dice_of(own, better) - dice_of(own, worse)
            print(f"{better} - {worse} = {with_interval(difference, '+.4f')}")


def main():
    numbers = {"folds": 5, "seeds": 1, "size": 96, "spacing": 1.6, "channels": 16, "steps": 500}
    parser = make_parser(__doc__, "scarce", **numbers, registration_steps=1000)
    what = "numbers of labelled patients to try, or all"
    parser.add_argument("--patients", nargs="+", default=["all"], help=what)
    parser.add_argument("--recipe", default="strong", choices=("paper", "strong"))
    args, others = parser.parse_known_args()

    def train(seed, fold, patients):
        place = args.out / f"fold{fold}"
        data = write_fold(args.data, place / "data", fold, args.folds)
        return run(data, place / patients / f"seed{seed}", patients, seed, args, others)

    jobs = [{"seed": seed, "fold": fold, "patients": patients} for seed in range(args.seeds)
            for fold in range(args.folds) for patients in args.patients]
    print_results(results(args.out / "cases.csv", COLUMNS, jobs, train, args, others))


if __name__ == "__main__":
    main()
