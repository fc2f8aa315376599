"""Table 1 on the phantom with a third row, the oracle: a U-Net trained on the true label of every frame.

    python experiments/phantom_table.py --out experiments/runs/phantom --seeds 5

One registration carries the labels; each seed trains three U-Nets at equal steps. Seeds that are in
OUT/cases.csv already are not run again. Ends with the table, mean and standard deviation over seeds, and with
the gain of `propagated` over `original` and the way left to the oracle, with 95 % intervals over patients and
seeds.
"""

import argparse
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
from common import call, interval, patient_means

import propagate_labels
import train_registration
import train_segmentation
from cardiac import demo, evaluation, phantom
from cardiac.cache import open_cache
from cardiac.files import read_csv, write_csv
from cardiac.networks import SegmentationNetwork
from cardiac.propagation import Propagated
from cardiac.run import choose_device
from cardiac.settings import EvaluationSettings, PropagationSettings, parse
from cardiac.training import load_network

MODELS = ("original", "propagated", "oracle")
COLUMNS = ("seed", *evaluation.CASES)
UNSEEN = ("C", "D")


def register_and_propagate(out, common, words):
    """One registration and propagation for all seeds; its labels, and their scores against the truth."""
    folder = out / "registered"
    grid = ["--size", str(words.size), "--spacing", str(words.spacing)]
    steps = ["--max-steps", words.registration_steps]
    call(train_registration, *common, "--out", folder, *grid, *steps)
    call(propagate_labels, *common, "--out", folder)
    settings = parse(PropagationSettings, [*common, "--out", str(folder)], None, earlier=("registration",))
    if not (out / "truth.csv").exists():
        rows = demo.score_against_truth(settings)
        write_csv(out / "truth.csv", list(rows[0]), rows)
    return folder / "propagation", settings


def run_seed(out, common, seed, words, propagation, cache):
    """Train and score the three U-Nets of one seed: rows of cases.csv."""
    device, rows = choose_device("auto"), []
    cases = [case for case in cache.split("Testing") if case.labelled]
    for model in MODELS:
        folder = out / f"seed{seed}" / ("oracle" if model == "oracle" else "paper")
        kind = "propagated" if model == "oracle" else model
        shutil.copytree(propagation, folder / "propagation", dirs_exist_ok=True)
        if model == "oracle":
            true_labels(cache).write(folder / "propagation" / "labels.h5", "the phantom's truth")
        seeded = [*common, "--out", str(folder), "--seed", str(seed)]
        grid = ["--size", str(words.size), "--spacing", str(words.spacing), "--channels", str(words.channels)]
        steps = ["--max-steps", str(words.steps), "--steps-per-epoch", "100", "--labels", kind]
        call(train_segmentation, *seeded, *grid, *steps)
        network = SegmentationNetwork(words.channels)
        load_network(network, folder / "segmentation" / kind / "best.pt", device)
        settings = parse(EvaluationSettings, [*seeded, *grid], None)
        scored = evaluation.score_model(
            model, network, cache, cases, settings, device, folder / "predictions"
        )
        rows += [{"seed": seed, **row} for row, _ in scored]
    return rows


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


def by_seed(rows, model, vendors):
    """Mean Dice of each seed and patient of these vendors: (seeds, patients)."""
    means = patient_means(rows, lambda row: row["model"] == model and row["vendor"] in vendors)
    seeds, cases = (sorted(set(names)) for names in zip(*means))
    return np.array([[means[seed, case] for case in cases] for seed in seeds])


def print_results(rows, truth):
    """Table 1 with three rows over the seeds, gains with intervals, and the propagation against the truth."""
    seeds = sorted({row["seed"] for row in rows}, key=int)
    numbers = [{**row, "dice": float(row["dice"] or "nan")} for row in rows]
    print(f"\n{len(seeds)} seeds; mean (standard deviation over seeds)\n")
    print("| model | " + " | ".join(evaluation.TABLE[1:]) + " |")
    print("|---" + "|---:" * len(evaluation.TABLE[1:]) + "|")
    for model in MODELS:
        tables = [
            evaluation.table_row(model, [r for r in numbers if (r["model"], r["seed"]) == (model, seed)])
            for seed in seeds
        ]
        cells = [[table[name] for table in tables] for name in evaluation.TABLE[1:]]
        print(
            f"| {model} | " + " | ".join(f"{np.mean(cell):.3f} ({np.std(cell):.3f})" for cell in cells) + " |"
        )
    print()
    for name, vendors in (("all vendors", tuple("ABCD")), ("seen A, B", ("A", "B")), ("unseen C, D", UNSEEN)):
        means = {model: by_seed(rows, model, vendors) for model in MODELS}
        for better, worse in (("propagated", "original"), ("oracle", "original"), ("oracle", "propagated")):
            mean, low, high = interval(means[better] - means[worse])
            print(f"{name}: {better} - {worse} = {mean:+.4f} [{low:+.4f}, {high:+.4f}]")
    print("\npropagated labels against the truth:")
    demo.print_truth([{name: _number(text) for name, text in row.items()} for row in truth])


def _number(text):
    try:
        return float(text or "nan")
    except ValueError:
        return text


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("experiments/runs/phantom"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--size", type=int, default=96, help="pixels")
    parser.add_argument("--spacing", type=float, default=2.0, help="mm")
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--steps", type=int, default=600, help="of each U-Net")
    parser.add_argument("--registration-steps", type=int, default=1000)
    words = parser.parse_args()
    data = words.out / "phantom"
    if not (data / "phantom.json").exists():
        phantom.write_phantom(data)
    common = ["--data", str(data), "--cache", str(words.out / "cache")]
    propagation, settings = register_and_propagate(words.out, common, words)
    cache, path = open_cache(settings), words.out / "cases.csv"
    rows = read_csv(path) if path.exists() else []
    for seed in range(words.seeds):
        if str(seed) not in {row["seed"] for row in rows}:
            rows += run_seed(words.out, common, seed, words, propagation, cache)
            write_csv(path, COLUMNS, rows)
            rows = read_csv(path)
    print_results(rows, read_csv(words.out / "truth.csv"))


if __name__ == "__main__":
    main()
