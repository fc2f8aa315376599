"""The slice cache: all preprocessed slices of a dataset, in one HDF5 file.

Layout of the file, which is rebuilt whenever it does not match the settings or the dataset:

    images   (N, S, S) float16   every frame of every case, row = first + frame * slices + slice
    labels   (M, S, S) uint8     expert frames only, row = first_label + k * slices + slice, k = 0: ED, 1: ES
    cases    JSON, per case      code, first rows, centre of slices, share of labels cropped, label digests
    sources  JSON                {file: [size, mtime]}, and of each case its entries in the table
    skipped  JSON                why cases were left out
    attributes: schema, size, spacing, crop; made_from: a digest of these and of the first rows
"""

import contextlib
import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import h5py
import numpy as np

from cardiac.building import PREPROCESSING, SCHEMA, build, places_of
from cardiac.cases import Case, load_case, refusal
from cardiac.files import InputError, hdf5_dataset, locked
from cardiac.layouts import read_cases
from cardiac.parts import PARTS
from cardiac.preprocessing import Grid


@dataclass(frozen=True)
class CachedCase(Case):
    """A case and its place in the cache."""

    first: int  # row of frame 0, slice 0 in `images`
    first_label: int | None  # row of ED, slice 0 in `labels`; None without expert labels
    cropped: float  # share of labelled pixels outside the crop
    digests: tuple = ()  # of its expert labels at ED and ES, on its own grid
    crop_centre: tuple | None = None  # (x, y) pixel of its own grid at its slices' centre; None: image centre
    withheld: tuple = ()  # frames whose expert labels are treated as unknown

    @property
    def expert(self):
        """The frames whose expert labels are known: ED and ES, or fewer."""
        known = () if self.first_label is None else (self.ed, self.es)
        return tuple(frame for frame in known if frame not in self.withheld)

    @property
    def labelled(self):
        """Whether any frame has a known expert label."""
        return bool(self.expert)

    @property
    def slices(self):
        """Number of slices."""
        return self.shape[2]

    @property
    def frames(self):
        """Number of frames."""
        return self.shape[3]

    def identity(self):
        """A JSON value that changes when the case or its slices do."""
        return {**super().identity(), "crop": self.crop_centre, "withheld": self.withheld}

    def training_identity(self):
        """A JSON value that changes when what a network learns from this case does: its image (judged by file
        size), known labels, entries in the table. Copying the files does not change it.
        """
        labels = {t: self.digests[k] for k, t in enumerate((self.ed, self.es)) if t in self.expert}
        table = self.split, self.code, self.vendor, self.ed, self.es
        return [*table, os.stat(self.image).st_size, self.crop_centre, labels]

    def rows(self, frame):
        """Rows of a frame's slices in `images`: (Z,)."""
        return self.first + frame * self.slices + np.arange(self.slices)

    def label_rows(self, frame):
        """Rows of an expert frame's slices in `labels`: (Z,). Raises ValueError for any other frame."""
        if frame not in self.expert:
            raise ValueError(f"{self.code}: no expert label is known in frame {frame}")
        return self.first_label + (self.ed, self.es).index(frame) * self.slices + np.arange(self.slices)

    def grid(self, cache):
        """The `Grid` that maps between this case's own grid and the slices of `cache`."""
        return Grid(self.shape[:2], self.spacing[:2], cache.size, cache.spacing, self.crop_centre)


class SliceFile:
    """A cache file, held open: reads stay consistent even if another run replaces the file.

    Sent to another process (`parallel.from_first`), it is reopened there, which fails if it was replaced.
    """

    def __init__(self, path, inode=None):
        self.path, self._bytes = path, open(path, "rb")  # noqa: SIM115
        self.inode = os.fstat(self._bytes.fileno()).st_ino
        if self.inode != (inode or self.inode):
            raise InputError(f"{path}: another run has just rebuilt it; start again")
        with h5py.File(self._bytes) as file:
            self._offsets = {name: file[name].id.get_offset() for name in ("images", "labels")}

    def __reduce__(self):
        return SliceFile, (self.path, self.inode)

    def read(self, dataset, row_ranges, out):
        """Read ranges [(start, stop), ...] of "images" or "labels" one after the other into `out`."""
        offset, position = self._offsets[dataset], 0
        for start, stop in row_ranges:  # plain reads: HDF5 takes 50 % longer
            self._bytes.seek(offset + start * out[0].nbytes)
            self._bytes.readinto(out[position : position + stop - start])
            position += stop - start


@dataclass(frozen=True)
class Cache:
    """A slice cache on disk."""

    file: SliceFile = field(compare=False)
    root: Path  # of the dataset
    name: str
    size: int
    spacing: float  # mm
    cases: tuple  # of CachedCase
    skipped: tuple = ()  # why cases were left out with --skip-bad, one line each

    @property
    def path(self):
        """Path of the file."""
        return self.file.path

    def split(self, *names):
        """The cases of these splits."""
        return [case for case in self.cases if case.split in names]

    def training_and_validation(self, seed, held_out=None, finished=False):
        """Three lists of cases: to train on, to validate on, and to score for the log only.

        Validation uses labelled Validation cases of vendors that have training labels; those of other vendors
        are only logged. If there are none of the former, `_fifth` of the labelled training patients is held
        out, which is printed. held_out: codes of patients held out, [] for none, None: not yet chosen. If no
        other patient has labels, they are trained on, too. finished: whether the run is; if so, nothing is
        printed, and its Validation may have gone. Raises InputError without training labels, for a code that
        is not a labelled training patient's, and if the Validation of an unfinished run has gone.
        """
        training = self.split("Training")
        labelled = [case for case in training if case.labelled]
        if not labelled:
            raise InputError(f"{self.root}: no case of Training has labels; there is nothing to learn from")
        seen = {case.vendor for case in labelled}
        validation = [case for case in self.split("Validation") if case.labelled]
        unseen = [case for case in validation if case.vendor not in seen]
        validation = [case for case in validation if case.vendor in seen]
        if held_out == [] and not (validation or finished):
            what = "this run was validated on cases of Validation, which are now missing"
            raise InputError(f"{self.root}: {what}; restore them, or choose another --out")
        if held_out == [] or (validation and not held_out):
            return training, validation, unseen
        why = "held out for validation"
        if not held_out:
            held_out = [case.code for case in _fifth(labelled, seed)]
            why = f"no Validation cases{' of vendors that are trained on' if unseen else ''}; {why}"
        unknown = sorted(set(held_out) - {case.code for case in labelled})
        if unknown:
            what = f"not a labelled case of Training in {self.root}"
            if any(case.code == unknown[0] and case.withheld for case in training):
                what = "--labelled-cases withholds its labels"
            raise InputError(f"--held-out {unknown[0]}: {what}")
        validation = [case for case in labelled if case.code in held_out]
        codes = ", ".join(case.code for case in validation)
        notice = f"{why}: {len(validation)} of {len(labelled)} training patients, {codes}"
        if len(validation) == len(labelled):
            notice = f"warning: no other patient has labels: training and validating on {codes}"
        else:
            training = [case for case in training if case not in validation]
        if not finished:
            print(notice)
        return training, validation, unseen


def _fifth(cases, seed):
    """A random fifth of the cases, at least one; each vendor keeps a case, unless no vendor has two."""
    order = [cases[k] for k in np.random.default_rng(seed).permutation(len(cases))]
    left, drawn = Counter(case.vendor for case in cases), []
    for case in order:
        if left[case.vendor] > 1:
            left[case.vendor] -= 1
            drawn.append(case)
    return (drawn or order)[: max(1, len(cases) // 5)]


def open_cache(settings):
    """The `Cache` of the dataset `settings.data`, built or rebuilt if necessary. Raises InputError."""
    dataset = read_cases(settings.data)
    cases = dataset.good(settings.skip_bad)
    path = settings.cache / f"{dataset.name}.h5"
    wanted = {name: getattr(settings, name) for name in PREPROCESSING}
    wanted |= {"schema": SCHEMA, "sources": {}}
    for case in dataset.cases:
        wanted["sources"] |= case.identity()
    lock, folder = (path.with_name(f".{path.name}{suffix}") for suffix in (".lock", PARTS))
    with locked(lock, f"cache: waiting for another process at {path}", wait=True):
        reason = _rebuild_reason(path, wanted, cases, settings.skip_bad)
        if reason:
            print(f"cache: building {path}: {reason}", flush=True)
            build(path, folder, cases, wanted, settings)
        shutil.rmtree(folder, ignore_errors=True)
        file = SliceFile(path)
        with h5py.File(path) as content:
            places = json.loads(content["cases"][()])
            skipped = (*dataset.problems, *json.loads(content["skipped"][()]))
    for warning in dataset.warnings:
        print(f"warning: {warning}")
    if skipped and not settings.skip_bad:
        raise refusal(skipped, settings.data)
    known = {case.code: case for case in cases}
    cached = tuple(CachedCase(**vars(known[place.pop("code")]), **place) for place in places)
    cache = Cache(file, dataset.root, dataset.name, settings.size, settings.spacing, cached, skipped)
    _report(cache)
    if not hasattr(settings, "labelled_phases"):
        return cache
    cache = withhold(cache, vars(settings))
    if any(case.withheld for case in cache.cases):
        phases = settings.labelled_phases.replace("both", "ED and ES")
        chosen = ", ".join(case.code for case in cache.split("Training") if case.labelled)
        chosen = f"; in Training, only those of {chosen}" if settings.labelled_cases else ""
        print(f"labels used: those of {phases}{chosen}", flush=True)
    return cache


def withhold(cache, settings):
    """The cache with only those expert labels known that the settings {name: value} allow.

    `labelled_cases`: how many Training patients, chosen by seed, keep theirs; `labelled_phases`: ED, ES or
    both, in Training and in Validation, since validation guides training.
    """
    labelled = [case.code for case in cache.split("Training") if case.labelled]
    count = settings["labelled_cases"] or len(labelled)
    if count > len(labelled):
        what = f"Training of {cache.root} has {len(labelled)} labelled cases"
        raise InputError(f"--labelled-cases {count}: {what}")
    chosen = set(np.random.default_rng(settings["seed"]).permutation(labelled)[:count])
    cases = []
    for case in cache.cases:
        if case.labelled and case.split in ("Training", "Validation"):
            known = {"ED": (case.ed,), "ES": (case.es,), "both": case.expert}[settings["labelled_phases"]]
            if case.split == "Training" and case.code not in chosen:
                known = ()
            case = replace(case, withheld=tuple(set(case.expert) - set(known)))
        cases.append(case)
    return replace(cache, cases=tuple(cases))


def _rebuild_reason(path, wanted, cases, skip_bad):
    """Why the file at `path` cannot be used as it is for `cases`, or None if it can.

    Cases that were left out stay out for runs with --skip-bad, so that all of these see the same dataset; any
    other run tries them again, since the fault may have been temporary, such as a network drive's.
    """
    rows = places_of(cases)[1]
    if not path.exists():
        return "there is none yet"
    try:
        with h5py.File(path) as file:
            found = {name: file.attrs.get(name) for name in ("schema", *PREPROCESSING)}
            texts = (hdf5_dataset(file, name)[()] for name in ("sources", "cases", "skipped"))
            found["sources"], places, _ = map(json.loads, texts)
            there = {place["code"] for place in places}
            shapes = {name: hdf5_dataset(file, name).shape for name in rows}
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        return f"the file there is not readable ({str(error).splitlines()[0]})"
    for name in ("schema", *PREPROCESSING):
        if not np.array_equal(found[name], wanted[name]):
            return f"{name} differs: {found[name]} there, {wanted[name]} asked for"
    old, new = found["sources"], wanted["sources"]
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if changed:
        return f"sources differ: {sorted(changed)[0]} and {len(changed) - 1} more changed"
    expected = {name: (count, wanted["size"], wanted["size"]) for name, count in rows.items()}
    if shapes != expected:
        return f"the file there holds arrays of other shapes: {shapes}"
    tried_again = () if skip_bad else [case for case in cases if case.code not in there]
    for case in tried_again:
        with contextlib.suppress(InputError):
            load_case(case)
            return f"{case.code} can be read again"
    return None


def _report(cache):
    """Print what the cache holds, and warn of hearts that the crop cuts off."""
    for problem in cache.skipped:
        print(f"skipped: {problem}")
    cases = cache.cases
    slices = sum(case.slices * case.frames for case in cases)
    labelled = [case for case in cases if case.labelled]
    side = cache.size * cache.spacing
    print(f"cache: {cache.path}: {len(cases)} cases, {len(labelled)} labelled, {slices} slices "
          f"of {cache.size}x{cache.size} at {cache.spacing:g} mm ({side:.0f} mm)")
    if labelled:
        worst = max(labelled, key=lambda case: case.cropped)
        mean = sum(case.cropped for case in labelled) / len(labelled)
        line = f"labelled pixels outside the crop: {mean:.2%} on average, {worst.cropped:.2%} in {worst.code}"
        if not worst.cropped:
            line = "no labelled pixel outside the crop"
        elif worst.cropped > 0.01:
            line = f"warning: {line}; use a larger --size or --spacing"
        print(f"cache: {line}", flush=True)
