"""Table 1 on the phantom with a third row, the oracle: a U-Net trained on the true label of every frame.

    python experiments/phantom_table.py --out experiments/runs/phantom --seeds 5

Each seed trains a registration and three U-Nets at equal steps; the phantom is the same. Seeds that are in
OUT/cases.csv already are not run again. Ends with the table, mean and standard deviation over seeds, and with the
gain of `propagated` over `original` and the way left to the oracle, with 95 % intervals over patients and seeds.
"""

import argparse
from pathlib import Path

import evaluate
import nibabel as nib
import numpy as np
import propagate_labels
import train_registration
import train_segmentation

from cardiac import demo, evaluation, phantom
from cardiac.cache import open_cache
from cardiac.files import read_csv, write_csv
from cardiac.propagation import Propagated
from cardiac.settings import PropagationSettings, parse

MODELS = ("original", "propagated", "oracle")
COLUMNS = ("seed", *evaluation.CASES)
UNSEEN = ("C", "D")


def run_seed(data, out, seed, words):
    """Train and score the three models of one seed: rows of cases.csv, and of the propagation against the truth."""
    common = ["--data", str(data), "--cache", str(out / "cache"), "--seed", str(seed)]
    folder, oracle = out / f"seed{seed}", out / f"seed{seed}-oracle"
    grid = ["--size", str(words.size), "--spacing", str(words.spacing)]
    lengths = ["--channels", str(words.channels), "--max-steps", str(words.steps), "--steps-per-epoch", "50"]
    call(train_registration, common, ["--out", str(folder), *grid, "--max-steps", str(words.registration_steps)])
    call(propagate_labels, common, ["--out", str(folder)])
    call(train_segmentation, common, ["--out", str(folder), *lengths])
    call(evaluate, common, ["--out", str(folder)])
    settings = parse(PropagationSettings, [*common, "--out", str(folder)], None, earlier=("registration",))
    true_labels(open_cache(settings)).write(oracle / "propagation" / "labels.h5", "the phantom's truth")
    call(train_segmentation, common, ["--out", str(oracle), *grid, *lengths, "--labels", "propagated"])
    call(evaluate, common, ["--out", str(oracle)])
    rows = read_csv(folder / "evaluation" / "cases.csv")
    rows += [{**row, "model": "oracle"} for row in read_csv(oracle / "evaluation" / "cases.csv")]
    truth = demo.score_against_truth(settings)
    return [{"seed": seed, **row} for row in rows], [{"seed": seed, **row} for row in truth]


def call(script, common, words):
    """Run a script in this process; stop where it fails."""
    code = script.main([*common, *words])
    if code:
        raise SystemExit(code)


def true_labels(cache):
    """The true label of every frame but ED and ES of the labelled training cases, as `Propagated` labels."""
    labels, where = [], []
    for case in [case for case in cache.split("Training") if case.labelled]:
        truth = np.asarray(nib.load(cache.root / "truth" / f"{case.code}_sa_gt_all.nii.gz").dataobj)
        slices = case.grid(cache).labels_to_slices(truth.transpose(3, 2, 0, 1))
        for frame in set(range(case.frames)) - {case.ed, case.es}:
            labels += list(slices[frame])
            where += [(case.code, frame, z) for z in range(case.slices)]
    return Propagated(np.array(labels), where, np.ones(len(labels)))


def patient_means(rows, model, seeds, vendors):
    """Mean Dice of each seed and patient of these vendors: (seeds, patients)."""
    scores = {}
    for row in rows:
        if row["model"] == model and row["vendor"] in vendors and row["dice"]:
            scores.setdefault((row["seed"], row["case"]), []).append(float(row["dice"]))
    patients = sorted({case for _, case in scores})
    return np.array([[np.mean(scores[seed, case]) for case in patients] for seed in seeds])


def interval(differences, resamples=10_000):
    """Mean and 95 % bootstrap interval of differences (seeds, patients), both resampled."""
    generator = np.random.default_rng(0)
    seeds, patients = differences.shape
    means = [
        differences[generator.integers(seeds, size=seeds)][:, generator.integers(patients, size=patients)].mean()
        for _ in range(resamples)
    ]
    return differences.mean(), *np.percentile(means, (2.5, 97.5))


def print_results(rows, truth):
    """Table 1 with three rows over the seeds, gains with intervals, propagation against the truth."""
    seeds = sorted({row["seed"] for row in rows}, key=int)
    numbers = [{**row, "dice": float(row["dice"] or "nan")} for row in rows]
    print(f"\n{len(seeds)} seeds; mean (standard deviation over seeds)\n")
    print("| model | " + " | ".join(evaluation.TABLE[1:]) + " |\n|---" * 1 + "|---:" * len(evaluation.TABLE[1:]) + "|")
    for model in MODELS:
        tables = [
            evaluation.table_row(model, [r for r in numbers if (r["model"], r["seed"]) == (model, seed)])
            for seed in seeds
        ]
        cells = [[table[name] for table in tables] for name in evaluation.TABLE[1:]]
        print(f"| {model} | " + " | ".join(f"{np.mean(cell):.3f} ({np.std(cell):.3f})" for cell in cells) + " |")
    print()
    for name, vendors in (("all vendors", tuple("ABCD")), ("seen A, B", ("A", "B")), ("unseen C, D", UNSEEN)):
        means = {model: patient_means(rows, model, seeds, vendors) for model in MODELS}
        for better, worse in (("propagated", "original"), ("oracle", "original"), ("oracle", "propagated")):
            mean, low, high = interval(means[better] - means[worse])
            print(f"{name}: {better} - {worse} = {mean:+.4f} [{low:+.4f}, {high:+.4f}]")
    regions = {region: np.nanmean([float(row[region] or "nan") for row in truth]) for region in ("LV", "MYO", "RV")}
    print(f"\npropagated labels against the truth, {len(truth)} frames: "
          + ", ".join(f"{region} {value:.3f}" for region, value in regions.items())
          + f", mean {np.mean(list(regions.values())):.3f}")  # fmt: skip
    for seed in seeds:
        chosen = [np.nanmean([float(row[r] or "nan") for r in regions]) for row in truth if row["seed"] == seed]
        errors = [float(row["error_mm"]) for row in truth if row["seed"] == seed]
        print(f"  seed {seed}: mean Dice {np.mean(chosen):.3f}, end-point error {np.mean(errors):.2f} mm")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("experiments/runs/phantom"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--size", type=int, default=96, help="pixels")
    parser.add_argument("--spacing", type=float, default=2.0, help="mm")
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300, help="of each U-Net")
    parser.add_argument("--registration-steps", type=int, default=1000)
    words = parser.parse_args()
    data = words.out / "phantom"
    if not (data / "phantom.json").exists():
        phantom.write_phantom(data)
    paths = words.out / "cases.csv", words.out / "truth.csv"
    rows, truth = (read_csv(path) if path.exists() else [] for path in paths)
    for seed in range(words.seeds):
        if str(seed) in {row["seed"] for row in rows} & {row["seed"] for row in truth}:
            continue
        new_rows, new_truth = run_seed(data, words.out, seed, words)
        rows, truth = rows + new_rows, truth + new_truth
        write_csv(paths[1], list(truth[0]), truth)
        write_csv(paths[0], COLUMNS, rows)
    print_results(*(read_csv(path) for path in paths))


if __name__ == "__main__":
    main()
