"""Cases to one HDF5 file of preprocessed slices.

Layout of the file, which is rebuilt whenever it does not fit what is asked for:

    images   (N, S, S) float16   every frame of every case, row = first + frame * slices + slice
    labels   (M, S, S) uint8     expert frames alone, row = first_label + k * slices + slice for k of (ED, ES)
    cases, sources, skipped      JSON: of each case its code, first rows in both, the centre of its slices and
                                 the share of labels cropped; relative path -> size, mtime; why cases were
                                 left out
    attributes: schema, size, spacing, crop; made_from: these and where the cases begin
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from cardiac.cases import Case, load_case, refusal
from cardiac.files import InputError, hdf5_dataset, locked, sync_folder, write_in_place, writing_hdf5
from cardiac.layouts import read_cases
from cardiac.parts import PARTS, Parts
from cardiac.preprocessing import Grid, to_slices
from cardiac.workers import worker_pool

SCHEMA = 3
PREPROCESSING = ("size", "spacing", "crop")  # settings that the slices depend on
LONGEST_PROBLEM = 1000  # characters that are kept of why a case was left out


@dataclass(frozen=True)
class CachedCase(Case):
    """A case and where it lies in the cache."""

    first: int  # row of frame 0, slice 0 in `images`
    first_label: int | None  # row of ED, slice 0 in `labels`; None without expert labels
    cropped: float  # share of labelled pixels that the crop loses
    crop_centre: tuple | None = None  # (x, y) pixel of its own grid at its slices' centre; None: the image's
    withheld: tuple = ()  # frames whose expert labels are treated as unknown

    @property
    def expert(self):
        """The frames whose expert labels are known: ED and ES, or fewer."""
        known = () if self.first_label is None else (self.ed, self.es)
        return tuple(frame for frame in known if frame not in self.withheld)

    @property
    def phases(self):
        """{"ED": frame, "ES": frame}."""
        return {"ED": self.ed, "ES": self.es}

    @property
    def labelled(self):
        """Whether any frame has an expert label that is known."""
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
        """What tells when the case or its slices have changed, as JSON."""
        return {**super().identity(), "crop": self.crop_centre, "withheld": self.withheld}

    def rows(self, frame):
        """Rows of a frame's slices in `images`: (Z,)."""
        return self.first + frame * self.slices + np.arange(self.slices)

    def label_rows(self, frame):
        """Rows of an expert frame's slices in `labels`: (Z,). Raises ValueError for any other frame."""
        if frame not in self.expert:
            raise ValueError(f"{self.code}: no expert label is known in frame {frame}")
        return self.first_label + (self.ed, self.es).index(frame) * self.slices + np.arange(self.slices)

    def grid(self, cache):
        """The way between this case's own grid and the slices of `cache`."""
        return Grid(self.shape[:2], self.spacing[:2], cache.size, cache.spacing, self.crop_centre)


@dataclass(frozen=True)
class Cache:
    """A slice cache on disk. It holds no open file, so it can be handed to another process."""

    path: Path
    root: Path  # of the dataset
    name: str
    size: int
    spacing: float  # mm
    cases: tuple  # of CachedCase
    skipped: tuple = ()  # why cases were left out with --skip-bad, a line each

    def split(self, *names):
        """The cases of these splits."""
        return [case for case in self.cases if case.split in names]

    def training_and_validation(self, seed):
        """The cases to train on, to validate on, and to log alone: three lists.

        Validated on are labelled Validation cases of vendors that have training labels; those of other
        vendors are logged and decide nothing. Without the former, 20 % of the labelled training patients by
        seed, at least one; with one patient, that patient, with a warning. Raises InputError without training
        labels.
        """
        training = self.split("Training")
        labelled = [case for case in training if case.labelled]
        if not labelled:
            raise InputError(f"{self.root}: no case of Training has labels; there is nothing to learn from")
        seen = {case.vendor for case in labelled}
        validation = [case for case in self.split("Validation") if case.labelled]
        unseen = [case for case in validation if case.vendor not in seen]
        validation = [case for case in validation if case.vendor in seen]
        if validation:
            return training, validation, unseen
        if len(labelled) == 1:
            print(
                f"warning: no Validation, and one patient: {labelled[0].code} is trained and validated on"
            )
            return training, labelled, unseen
        chosen = np.random.default_rng(seed).permutation(len(labelled))[: max(1, len(labelled) // 5)]
        validation = [labelled[k] for k in sorted(chosen)]
        print(f"no Validation: {len(validation)} of {len(labelled)} training patients are held out for it: "
              + ", ".join(case.code for case in validation))  # fmt: skip
        return [case for case in training if case not in validation], validation, unseen

    def read(self, dataset, row_ranges, out):
        """Read ranges [(start, stop), ...] of "images" or "labels" one after the other into `out`."""
        offset, position = self.offset(dataset), 0
        with open(self.path, "rb") as file:  # plain reads: HDF5 takes half as long again
            for start, stop in row_ranges:
                file.seek(offset + start * out[0].nbytes)
                file.readinto(out[position : position + stop - start])
                position += stop - start

    def offset(self, dataset):
        """Where "images" or "labels" begins in the file, bytes: row by row from there, without HDF5."""
        with h5py.File(self.path) as file:
            return file[dataset].id.get_offset()


def open_cache(settings):
    """The cache of the dataset `settings.data`, built or rebuilt where it must be. Raises InputError."""
    dataset = read_cases(settings.data)
    cases = dataset.good(settings.skip_bad)
    path = settings.cache / f"{dataset.name}.h5"
    wanted = {name: getattr(settings, name) for name in PREPROCESSING}
    wanted |= {"schema": SCHEMA, "sources": {}}
    for case in dataset.cases:
        wanted["sources"] |= case.identity()
    with locked(
        path.with_name(f".{path.name}.lock"), f"cache: waiting for another process at {path}", wait=True
    ):
        reason = _misfit(path, wanted, _places(cases)[1])
        if reason:
            print(f"cache: building {path}: {reason}", flush=True)
            _build(path, dataset, wanted, settings)
        shutil.rmtree(_parts(path), ignore_errors=True)
    for warning in dataset.warnings:
        print(f"warning: {warning}")
    with h5py.File(path) as file:
        places = json.loads(file["cases"][()])
        skipped = (*dataset.problems, *json.loads(file["skipped"][()]))
    if skipped and not settings.skip_bad:
        raise refusal(skipped, settings.data)
    known = {case.code: case for case in cases}
    cached = tuple(CachedCase(**vars(known[place.pop("code")]), **place) for place in places)
    cache = Cache(path, dataset.root, dataset.name, settings.size, settings.spacing, cached, skipped)
    _report(cache)
    return _withhold(cache, settings) if hasattr(settings, "labelled_phases") else cache


def _withhold(cache, settings):
    """The cache with expert labels as few as the settings ask for: those of the rest are unknown.

    `labelled_cases`: patients of Training, chosen by seed, that keep theirs; `labelled_phases`: ED, ES or
    both, of Training and of Validation, which training decides by.
    """
    labelled = [case.code for case in cache.split("Training") if case.labelled]
    count = settings.labelled_cases or len(labelled)
    if count > len(labelled):
        what = f"Training of {cache.root} has {len(labelled)} labelled cases"
        raise InputError(f"--labelled-cases {count}: {what}")
    chosen = set(np.random.default_rng(settings.seed).permutation(labelled)[:count])
    cases = []
    for case in cache.cases:
        if case.labelled and case.split in ("Training", "Validation"):
            known = {"ED": (case.ed,), "ES": (case.es,), "both": case.expert}[settings.labelled_phases]
            if case.split == "Training" and case.code not in chosen:
                known = ()
            case = replace(case, withheld=tuple(set(case.expert) - set(known)))
        cases.append(case)
    return replace(cache, cases=tuple(cases))


def _places(cases):
    """Where each case begins in both arrays, {code: {...}}, None without labels; and {array: its slices}."""
    places, rows = {}, {"images": 0, "labels": 0}
    for case in cases:
        slices, frames, labelled = *case.shape[2:], case.ed is not None
        places[case.code] = {"first": rows["images"], "first_label": rows["labels"] if labelled else None}
        rows["images"] += slices * frames
        rows["labels"] += 2 * slices * labelled
    return places, rows


def _misfit(path, wanted, rows):
    """Why the file at `path` cannot be used as it is, or None."""
    if not path.exists():
        return "there is none yet"
    try:
        with h5py.File(path) as file:
            found = {name: file.attrs.get(name) for name in ("schema", *PREPROCESSING)}
            found["sources"] = json.loads(hdf5_dataset(file, "sources")[()])
            for name in ("cases", "skipped"):
                hdf5_dataset(file, name)
            shapes = {name: hdf5_dataset(file, name).shape for name in rows}
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        return f"the file there is not readable ({str(error).splitlines()[0]})"
    for name in ("schema", *PREPROCESSING):
        if not np.array_equal(found[name], wanted[name]):
            return f"{name} differs: {found[name]} there, {wanted[name]} asked for"
    changed = [
        name
        for name in {**found["sources"], **wanted["sources"]}
        if found["sources"].get(name) != wanted["sources"].get(name)
    ]
    if changed:
        return f"sources differ: {sorted(changed)[0]} and {len(changed) - 1} more changed"
    expected = {name: (count, wanted["size"], wanted["size"]) for name, count in rows.items()}
    return None if shapes == expected else f"the file there holds arrays of other shapes: {shapes}"


def _parts(path):
    """The folder, beside a cache, in which it is being built."""
    return path.with_name(f".{path.name}{PARTS}")


def _build(path, dataset, wanted, settings):
    """Preprocess the cases in worker processes, each of which writes its slices where they belong.

    Killed, it goes on with the cases that are not finished. What HDF5 has open does not survive a kill, so it
    lays the file out and leaves it: what is written from then on are bytes with a place.
    """
    cases = dataset.good(settings.skip_bad)
    (places, rows), grid = _places(cases), [wanted[name] for name in PREPROCESSING]
    made_from = hashlib.sha256(json.dumps([SCHEMA, grid, places]).encode()).hexdigest()
    file, sources = _parts(path) / f"{path.name}.building", json.dumps(wanted["sources"])
    if not _laid_out(file, made_from, sources):
        shutil.rmtree(_parts(path), ignore_errors=True)
        _lay_out(file, made_from, sources, wanted, rows, len(cases))
    with h5py.File(file) as laid_out:
        offsets = {name: dataset.id.get_offset() for name, dataset in laid_out.items()}

    def arguments(case):
        place, area = places[case.code], settings.size**2
        images_at = offsets["images"] + 2 * area * place["first"]
        labels_at = offsets["labels"] + area * place["first_label"] if case.ed is not None else None
        return case, *grid, file, images_at, labels_at

    found, problems = [], []
    parts = Parts(file.parent / "finished", (made_from,))
    with worker_pool(settings.workers, len(cases)) as run:
        results = parts.results(run, _preprocess, cases, arguments)
        for case, result in zip(cases, tqdm(results, "cache", len(cases), unit="case")):
            if "problem" in result:
                problems.append(result["problem"][:LONGEST_PROBLEM])
                if settings.skip_bad:
                    continue
                raise refusal(problems, settings.data)
            for warning in result["warnings"]:
                tqdm.write(f"warning: {warning}")
            found.append({"code": case.code, **places[case.code], **result["place"]})
    if not found:
        raise InputError(f"{dataset.root}: no case could be read")
    texts = {"cases": json.dumps(found), "sources": sources, "skipped": json.dumps(problems)}
    write_in_place(file, {offsets[name]: text.encode() for name, text in texts.items()})
    os.replace(file, path)
    sync_folder(path.parent)


def _laid_out(path, made_from, sources):
    """Whether the file at `path` was laid out for the same slices, with room for the text `sources`."""
    try:
        with h5py.File(path) as file:
            return file.attrs["made_from"] == made_from and file["sources"].nbytes >= len(sources)
    except (OSError, KeyError):  # there is none, or it is not whole
        return False


def _lay_out(path, made_from, sources, wanted, rows, cases):
    """Write the file of the cache without slices: everything that it is to hold has its place on the disk."""
    size, kinds = wanted["size"], {"images": np.float16, "labels": np.uint8}
    lengths = {"cases": 1000 * cases, "sources": len(sources) + 100 * cases}  # that of a mended case may grow
    lengths["skipped"] = 6 * LONGEST_PROBLEM * cases  # JSON takes up to six bytes for a character
    room = (2 * rows["images"] + rows["labels"]) * size**2 + sum(lengths.values()) + 2**20
    with writing_hdf5(path, room) as file:
        for name, kind in kinds.items():
            # contiguous: a case is one run of bytes, read at the speed of the disk
            array = file.create_dataset(name, (rows[name], size, size), kind)
            if rows[name]:
                array[-1] = 0  # HDF5 gives no place to what was never written
        for name, length in lengths.items():
            file.create_dataset(name, data=np.array(b"", f"S{length}"))
        file.attrs.update({name: wanted[name] for name in ("schema", *PREPROCESSING)})
        file.attrs["made_from"] = made_from


def _preprocess(case, size, spacing, crop, file, images_at, labels_at):
    """Write one case's images (T * Z, S, S) float16 and labels (2 * Z, S, S) uint8, where it has any, into
    `file` at these offsets. Returns the centre of its slices and the share cropped ("place"), and warnings;
    or the problem that it has.
    """
    try:
        image, labels, warnings = load_case(case)
    except InputError as error:
        return {"problem": str(error)}
    images, grid = to_slices(image, case.spacing, size, spacing, crop)
    pieces, place = {images_at: images}, {"crop_centre": grid.centre, "cropped": 0.0}
    if case.ed is not None:
        planes = np.concatenate([labels[frame].transpose(2, 0, 1) for frame in (case.ed, case.es)])
        foreground = planes > 0
        place["cropped"] = 1 - float((foreground & grid.inside()).sum() / foreground.sum())
        pieces[labels_at] = grid.labels_to_slices(planes)
    write_in_place(file, pieces)
    return {"place": place, "warnings": warnings}


def _report(cache):
    """Say what the cache holds, and warn of hearts outside the crop."""
    for problem in cache.skipped:
        print(f"skipped: {problem}")
    cases = cache.cases
    slices = sum(case.slices * case.frames for case in cases)
    labelled = [case for case in cases if case.labelled]
    side = cache.size * cache.spacing
    print(f"cache: {cache.path}: {len(cases)} cases, {len(labelled)} labelled, {slices} slices "
          f"of {cache.size}x{cache.size} at {cache.spacing:g} mm ({side:.0f} mm)")  # fmt: skip
    if labelled:
        worst = max(labelled, key=lambda case: case.cropped)
        mean = sum(case.cropped for case in labelled) / len(labelled)
        line = f"labelled pixels outside the crop: {mean:.2%} on average, {worst.cropped:.2%} in {worst.code}"
        if worst.cropped > 0.01:
            line = f"warning: {line}; take a larger --size or --spacing"
        print(f"cache: {line}", flush=True)
