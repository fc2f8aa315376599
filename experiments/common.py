"""What the experiments share: scripts run in this process, and intervals over patients and seeds."""

import numpy as np


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
    """Mean and 95 % bootstrap interval of differences (repetitions, patients), both resampled."""
    generator = np.random.default_rng(0)
    differences = np.atleast_2d(differences)
    repetitions, patients = differences.shape
    means = [
        differences[generator.integers(repetitions, size=repetitions)][
            :, generator.integers(patients, size=patients)
        ].mean()
        for _ in range(resamples)
    ]
    return differences.mean(), *np.percentile(means, (2.5, 97.5))


def by_seed(rows, keep):
    """Mean Dice of each seed and patient, (seeds, patients), of the rows that `keep(row)` chooses."""
    means = patient_means(rows, keep)
    seeds, cases = (sorted(set(names)) for names in zip(*means))
    return np.array([[means.get((seed, case), np.nan) for case in cases] for seed in seeds])


def with_interval(values, form):
    """A mean and its interval in words, of values (seeds, patients)."""
    mean, low, high = (format(value, form) for value in interval(values))
    return f"{mean} [{low}, {high}]"
