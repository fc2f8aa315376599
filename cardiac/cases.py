"""A case of a dataset: its metadata from tables and headers, and its voxels, checked.

Every fault of a case is reported on one line: the case, the file, what is wrong and, if possible, what to do.
"""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cardiac import LABELS
from cardiac.files import InputError, file_error, joined
from cardiac.nifti import axes_of, read_header, read_image, read_label_values

SPLITS = ("Training", "Validation", "Testing")
VENDORS = {"A": "Siemens", "B": "Philips", "C": "GE", "D": "Canon"}

LV, MYO, RV = LABELS.values()


@dataclass(frozen=True)
class Case:
    """One patient: what is known without reading voxels."""

    code: str  # letters, digits, '.', '_', '-': fit for file names and tables
    vendor: str  # A, B, C or D, see VENDORS
    centre: str  # '' if unknown
    split: str  # one of SPLITS
    ed: int | None  # frame of end-diastole, zero-based; None without expert labels (Training/Unlabeled)
    es: int | None  # frame of end-systole
    root: Path  # folder of the dataset
    image: Path  # the cine, 4-D NIfTI
    labels: tuple[Path, ...]  # one 4-D file, or the 3-D files of ED and ES; empty without expert labels
    label_order: tuple[int, ...]  # our label for each value in these files
    shape: tuple[int, int, int, int]  # X, Y, slices Z, frames T
    spacing: tuple[float, float, float]  # mm: X, Y, from slice to slice

    @property
    def phases(self):
        """{"ED": frame, "ES": frame}."""
        return {"ED": self.ed, "ES": self.es}

    @property
    def files(self):
        """All source files, relative to `root`."""
        return tuple(path.relative_to(self.root).as_posix() for path in (self.image, *self.labels))

    def identity(self):
        """A JSON value that changes when the case does: size and mtime of its files, entries in the table."""
        status = {name: os.stat(self.root / name) for name in self.files}
        sources = {name: [each.st_size, each.st_mtime_ns] for name, each in status.items()}
        return {**sources, f"{self.split}/{self.code}": [self.vendor, self.centre, self.ed, self.es]}


@dataclass(frozen=True)
class Dataset:
    root: Path  # the folder that holds Training, Validation, Testing
    name: str  # of the folder that the user gave
    kind: str  # "M&Ms" or "ACDC"
    cases: tuple[Case, ...]  # the good ones, by split, then code
    problems: tuple[str, ...]  # one line each, beginning with the case or table that is left out
    warnings: tuple[str, ...]

    def good(self, skip_bad=False):
        """The good cases; InputError if there are none or, without `skip_bad`, if there is any problem."""
        if self.problems and not (skip_bad and self.cases):
            raise refusal(self.problems, self.root)
        return self.cases


def refusal(problems, root):
    """The InputError that stops a script because of these problems: the first, and how to list them all."""
    others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return InputError(
        f"{problems[0]}{others}. `python -m cardiac.check --data {shlex.quote(str(root))}` lists them all, "
        "--skip-bad leaves these cases out"
    )


def load_case(case):
    """Read the voxels of a case.

    Returns image (X, Y, Z, T), see `nifti.read_image`; labels {frame: uint8 (X, Y, Z)} of ED and ES, in M&Ms
    order, or {}; warnings, a list of lines. Raises InputError, beginning with the code, for bad voxels.
    """
    try:
        image, labels, warnings = read_image(case.image), load_labels(case), []
        flat = [t for t in range(case.shape[3]) if np.ptp(image[..., t]) == 0]
        if any(t in flat for t in labels):
            what = f"constant in frame {joined(flat)}, which has labels; download it again"
            raise file_error(case.image, what)
    except InputError as error:
        raise InputError(f"{case.code}: {error}") from error
    for path in case.labels:
        if _axes_differ(path, case.image):
            warnings.append(f"{case.code}: affines of {path.name} and its image differ: is it flipped?")
    if flat:
        warnings.append(f"{case.code}: image is constant in frame {joined(flat)}")
    if _looks_swapped(labels.values()):
        warnings.append(f"{case.code}: LV and RV look swapped: the myocardium encloses label 3, not label 1")
    return image, labels, warnings


def load_labels(case):
    """Expert labels {frame: uint8 (X, Y, Z)}; InputError unless ED and ES, and no other frame, have any."""
    if not case.labels:
        return {}
    volumes = [read_label_values(path) for path in case.labels]
    if len(volumes) == 1:
        labels = {t: volumes[0][..., t] for t in range(case.shape[3])}
    else:
        labels = dict(zip((case.ed, case.es), volumes))
    present = [t for t, label in labels.items() if label.any()]
    if set(present) != {case.ed, case.es}:
        empty = [phase for phase, t in case.phases.items() if t not in present]
        what = f"ground truth is empty at {joined(empty, ' and ')}" if empty else "label in the wrong frame"
        where = f"frame {joined(present)}" if present else "no frame"
        what += f": labels in {where}, but ED is {case.ed} and ES {case.es} (from 0); correct either"
        raise file_error(case.labels[0], what)
    order = np.array(case.label_order, np.uint8)
    return {t: order[labels[t]] for t in present}


def _axes_differ(labels, image):
    """Whether the voxel axes in a label file's affine differ by 5 % or more from those of its image."""
    try:
        axes, others = (axes_of(read_header(path, (3, 4)), path) for path in (image, labels))
    except InputError:  # an unreadable affine; the voxels are read without it
        return True
    return not (np.linalg.norm(axes - others, axis=0) < 0.05 * np.linalg.norm(axes, axis=0)).all()


def _looks_swapped(labels):
    """Whether more of label 3's border than of label 1's is myocardium, which should enclose the LV."""
    beside = np.zeros((4, 4))  # how often one label lies beside another within a slice
    for label in labels:
        for one, other in ((label[1:], label[:-1]), (label[:, 1:], label[:, :-1])):
            counts = np.bincount((4 * one + other)[one != other], minlength=16).reshape(4, 4)
            beside += counts + counts.T
    enclosed = beside[:, MYO] / beside.sum(axis=1).clip(1)
    return enclosed[RV] > enclosed[LV] > 0
