"""What the experiments share: words, jobs that are not done twice, intervals over patients."""

import argparse
from pathlib import Path

import numpy as np

from cardiac import phantom
from cardiac.files import read_csv, write_csv

WORDS = {
    "seeds": "how many",
    "folds": "how many",
    "size": "pixels",
    "spacing": "mm",
    "channels": "of the U-Net's first level; they double",
    "steps": "of each network",
    "registration_steps": "of each registration",
    "steps_per_epoch": "between two validations",
}


def arguments(doc, name, data=True, **defaults):
    """The parser of an experiment with --out, --data (where `data`), and `defaults` for those of WORDS."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if data:
        what = "dataset in the layout of M&Ms or ACDC"
        parser.add_argument("--data", type=Path, required=True, help=what)
    parser.add_argument("--out", type=Path, default=Path("experiments/runs") / name)
    for word, default in defaults.items():
        flag, text = f"--{word.replace('_', '-')}", f"{WORDS[word]} (default {default})"
        parser.add_argument(flag, type=type(default), default=default, metavar="N", help=text)
    return parser


def results(path, columns, jobs, run):
    """Rows of the CSV file at `path` that belong to `jobs`, mappings of the columns that name a job.

    Of a job that has none yet `run(**job)` gives them, and they are written before the next one begins.
    """
    rows, wanted = read_csv(path) if path.exists() else [], []
    for job in jobs:
        name = {column: str(value) for column, value in job.items()}.items()
        if not any(row.items() >= name for row in rows):
            write_csv(path, columns, rows + [{**job, **row} for row in run(**job)])
            rows = read_csv(path)
        wanted += [row for row in rows if row.items() >= name]
    return wanted


def phantom_in(folder):
    """The phantom dataset in a folder, written where there is none."""
    if not phantom.is_whole(folder):
        phantom.write_phantom(folder)
    return folder


def call(script, *words):
    """Run a script of the project in this process; stop where it fails."""
    code = script.main([str(word) for word in words])
    if code:
        raise SystemExit(code)


def patient_means(rows, keep):
    """Mean non-empty Dice {(repetition, case): Dice} of the rows of a cases.csv that `keep(row)` chooses.

    A row's repetition is its column `seed` or `fold`.
    """
    scores = {}
    for row in rows:
        if keep(row) and row["dice"] not in ("", "nan"):
            repetition = row.get("seed") or row.get("fold")
            scores.setdefault((repetition, row["case"]), []).append(float(row["dice"]))
    return {key: np.mean(values) for key, values in scores.items()}


def interval(differences, resamples=10_000):
    """Mean and 95 % bootstrap interval of differences (repetitions, patients), resampled, NaN left out."""
    generator = np.random.default_rng(0)
    differences = np.atleast_2d(differences)
    repetitions, patients = differences.shape
    means = []
    for _ in range(resamples):
        drawn = differences[generator.integers(repetitions, size=repetitions)]
        means.append(np.nanmean(drawn[:, generator.integers(patients, size=patients)]))
    return np.nanmean(differences), *np.percentile(means, (2.5, 97.5))


def by_seed(rows, keep):
    """Mean Dice of each seed and patient, (seeds, patients), of the rows that `keep(row)` chooses."""
    means = patient_means(rows, keep)
    seeds, cases = (sorted(set(names)) for names in zip(*means))
    return np.array([[means.get((seed, case), np.nan) for case in cases] for seed in seeds])


def with_interval(values, form):
    """A mean and its interval in words, of values (seeds, patients)."""
    mean, low, high = (format(value, form) for value in interval(values))
    return f"{mean} [{low}, {high}]"
