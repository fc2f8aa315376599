"""Shared by the experiments: options, jobs that are not repeated, intervals over patients and seeds."""

import argparse
import importlib.metadata
import inspect
import sys
import types
import warnings
from pathlib import Path

import numpy as np

from cardiac import REGIONS, phantom
from cardiac.files import InputError, read_csv, read_json, write_csv, write_json

OPTIONS = {
    "seeds": "number of seeds",
    "folds": "number of folds",
    "size": "pixels along each side of a slice",
    "spacing": "mm per pixel",
    "channels": "channels of the U-Net's first level; each further level has twice as many",
    "steps": "training steps of each network",
    "registration_steps": "training steps of each registration",
    "steps_per_epoch": "steps between two validations",
    "sweep_steps": "steps of each contestant and learning rate",
    "every": "steps between two scorings",
    "turn": "steps per turn",
}
# may change without invalidating rows: where, how many, which
MAY_CHANGE = ("seeds", "patients", "recipes", "out")


def make_parser(doc, name=None, data=True, **defaults):
    """The parser of an experiment with --out, --data (if `data`), and the options of OPTIONS in `defaults`.

    name: of the folder for its results; if None, --out is the folder of an existing run.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if data:
        what = "dataset in the layout of M&Ms (acdc_folder.py makes one of ACDC)"
        parser.add_argument("--data", type=Path, required=True, help=what)
    if name:
        folder = Path("experiments/runs") / name
        parser.add_argument("--out", type=Path, default=folder, help=f"results folder (default {folder})")
    else:
        parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    for word, default in defaults.items():
        flag, text = f"--{word.replace('_', '-')}", f"{OPTIONS[word]} (default {default})"
        parser.add_argument(flag, type=type(default), default=default, metavar="N", help=text)
    return parser


def results(path, columns, jobs, run, args, others=()):
    """The rows of `jobs`, dicts of the columns that identify a job, in the CSV file at `path`.

    For a job without rows, `run(**job)` returns them; they are written before the next job begins. args,
    others: options known to the experiment, and all others; rows made with other values are refused.
    """
    typed = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    typed = {name: str(v.resolve() if isinstance(v, Path) else v) for name, v in typed.items()}
    elsewhere = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--device", "--workers", "--cache"):  # where and in how many processes: no effect on rows
        elsewhere.add_argument(flag)
    typed["others"], noted = " ".join(elsewhere.parse_known_args(others)[1]), path.with_suffix(".json")
    before = typed
    if path.exists():
        try:
            before = read_json(noted) if noted.exists() else {}
        except InputError:
            raise SystemExit(f"{noted}: not readable; choose another --out") from None
    for name in typed:
        if before.get(name) != typed[name]:
            raise SystemExit(
                f"{path}: made with {name} {before.get(name)}, not {typed[name]}; choose another --out"
            )
    write_json(noted, typed)
    rows, wanted = read_csv(path) if path.exists() else [], []
    for job in jobs:
        name = {column: str(value) for column, value in job.items()}.items()
        if not any(row.items() >= name for row in rows):
            write_csv(path, columns, rows + [{**job, **row} for row in run(**job)])
            rows = read_csv(path)
        wanted += [row for row in rows if row.items() >= name]
    return wanted


def phantom_in(folder):
    """The phantom dataset in a folder, written if there is none."""
    if not phantom.is_complete(folder):
        phantom.write_phantom(folder)
    return folder


def voxelmorph_networks():
    """VoxelMorph's `torch.networks` without the package's __init__, which needs neurite and TensorFlow."""
    if "voxelmorph" not in sys.modules:
        try:
            installed = importlib.metadata.distribution("voxelmorph")
        except importlib.metadata.PackageNotFoundError:
            raise SystemExit("pip install --no-deps voxelmorph==0.2") from None
        package = types.ModuleType("voxelmorph")
        package.__path__ = [str(installed.locate_file("voxelmorph"))]
        # as in its py/utils.py: encoder, decoder
        package.default_unet_features = lambda: [[16, 32, 32, 32], [32, 32, 32, 32, 32, 16, 16]]
        sys.modules["voxelmorph"] = package
    if not hasattr(inspect, "getargspec"):  # removed in Python 3.11
        inspect.getargspec = lambda function: inspect.getfullargspec(function)[:4]
    warnings.filterwarnings("ignore", "torch.meshgrid")
    return importlib.import_module("voxelmorph.torch.networks")


def call(script, *args):
    """Run a script of the project in this process; exit if it fails."""
    code = script.main([str(word) for word in args])
    if code:
        raise SystemExit(code)


def interval(differences, resamples=10_000):
    """Mean and 95 % bootstrap interval of differences (seeds, patients): both are resampled, NaN left out."""
    generator = np.random.default_rng(0)
    differences = differences[:, ~np.isnan(differences).all(0)]
    seeds, patients = differences.shape
    means = []
    for _ in range(resamples):
        drawn = differences[generator.integers(seeds, size=seeds)]
        means.append(np.nanmean(drawn[:, generator.integers(patients, size=patients)]))
    return np.nanmean(differences), *np.percentile(means, (2.5, 97.5))


def by_seed(rows, keep):
    """Mean Dice (seeds, patients) over the rows of a cases.csv with a column `seed` that `keep(row)` selects;
    empty scores are left out, NaN if none is left.
    """
    seeds, cases = (sorted({row[name] for row in rows}) for name in ("seed", "case"))
    scores = {}
    for row in rows:
        if keep(row) and row["dice"] not in ("", "nan"):
            scores.setdefault((row["seed"], row["case"]), []).append(float(row["dice"]))
    return np.array([[np.mean(scores.get((seed, case), np.nan)) for case in cases] for seed in seeds])


def dice_of(rows, model, regions=REGIONS):
    """Mean Dice (seeds, patients) of one model over these regions."""
    return by_seed(rows, lambda row: row["model"] == model and row["region"] in regions)


def over_seeds(values, form=".3f"):
    """The mean as text and, if there are several seeds, their standard deviation (n - 1) in brackets."""
    spread = f" ({np.std(values, ddof=1):{form}})" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{spread}"


def with_interval(values, form):
    """The mean of values (seeds, patients) and its interval, as text."""
    mean, low, high = (format(value, form) for value in interval(values))
    return f"{mean} [{low}, {high}]"
