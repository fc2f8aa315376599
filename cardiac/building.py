"""Building the slice cache: one file, laid out first and then filled in place by worker processes.

An HDF5 file that is open when its process is killed is lost. So HDF5 only lays the file out, with space for
every slice and text, and closes it. From then on plain bytes are written in place, and the part that marks a
case as finished (`parts.py`) is written after its slices are on disk.
"""

import json
import os
import shutil

import h5py
import numpy as np
from tqdm import tqdm

from cardiac.cases import load_case, refusal
from cardiac.files import InputError, digest, sync_folder, write_in_place, writing_hdf5
from cardiac.parts import Parts
from cardiac.preprocessing import cine_to_slices
from cardiac.workers import worker_pool

SCHEMA = 6
PREPROCESSING = ("size", "spacing", "crop")  # settings that the slices depend on
LONGEST_PROBLEM = 500  # characters kept of the reason why a case was left out


def places_of(cases):
    """First rows of each case by code, `first_label` None without labels; and {array: number of rows}."""
    places, rows = {}, {"images": 0, "labels": 0}
    for case in cases:
        slices, frames, labelled = *case.shape[2:], case.ed is not None
        places[case.code] = {"first": rows["images"], "first_label": rows["labels"] if labelled else None}
        rows["images"] += slices * frames
        rows["labels"] += 2 * slices * labelled
    return places, rows


def build(path, folder, cases, wanted, settings):
    """Preprocess `cases` into a new cache at `path`; after a kill, resume with the unfinished ones.

    wanted: size, spacing, crop and schema of the cache, and its sources. Without --skip-bad, raises
    InputError for the first case that cannot be used.
    """
    (places, rows), grid = places_of(cases), [wanted[name] for name in PREPROCESSING]
    made_from = digest(json.dumps([SCHEMA, grid, places, rows]))
    file, sources = folder / f"{path.name}.building", json.dumps(wanted["sources"])
    if not _laid_out(file, made_from, sources):
        shutil.rmtree(file.parent, ignore_errors=True)
        _lay_out(file, made_from, sources, wanted, rows, len(cases))
    with h5py.File(file) as laid_out:
        offsets = {name: array.id.get_offset() for name, array in laid_out.items()}
        room = {name: array.nbytes for name, array in laid_out.items()}

    def arguments(case):
        place, area = places[case.code], settings.size**2
        images_at = offsets["images"] + 2 * area * place["first"]
        labels_at = offsets["labels"] + area * place["first_label"] if case.ed is not None else None
        return case, *grid, file, images_at, labels_at

    found, problems = [], []
    parts = Parts(file.parent / "finished", (made_from,))
    with worker_pool(settings.workers, len(cases)) as run:
        results = parts.results(run, _preprocess, cases, arguments)
        for case, result in tqdm(zip(cases, results), "cache", len(cases), unit="case"):
            if "problem" in result:
                parts.forget(case)  # it may be usable next time: fixed, or readable again
                problems.append(result["problem"])
                if settings.skip_bad:
                    continue
                raise refusal(problems, settings.data)
            for warning in result["warnings"]:
                tqdm.write(f"warning: {warning}")
            found.append({"code": case.code, **places[case.code], **result["place"]})
    if not found:
        raise InputError(f"{settings.data}: no case could be read")
    kept = [problem[:LONGEST_PROBLEM] for problem in problems]
    texts = {"cases": json.dumps(found), "sources": sources, "skipped": json.dumps(kept)}
    # padded to full length: a killed attempt may have left a longer text there
    texts = {name: text.encode().ljust(room[name], b"\0") for name, text in texts.items()}
    write_in_place(file, {offsets[name]: text for name, text in texts.items()})
    os.replace(file, path)
    sync_folder(path.parent)


def _laid_out(path, made_from, sources):
    """Whether the file at `path` was laid out for the same slices, with room for the text `sources`."""
    try:
        with h5py.File(path) as file:
            return file.attrs["made_from"] == made_from and file["sources"].nbytes >= len(sources)
    except (OSError, KeyError):  # missing or incomplete
        return False


def _lay_out(path, made_from, sources, wanted, rows, cases):
    """Write the cache file without its slices, but with disk space allocated for everything it will hold."""
    size, kinds = wanted["size"], {"images": np.float16, "labels": np.uint8}
    lengths = {"cases": 1000 * cases, "sources": len(sources) + 100 * cases}  # a corrected case's may grow
    lengths["skipped"] = 13 * LONGEST_PROBLEM * cases  # JSON needs up to twelve bytes per character
    room = (2 * rows["images"] + rows["labels"]) * size**2 + sum(lengths.values()) + 2**20
    with writing_hdf5(path, room) as file:
        for name, kind in kinds.items():
            # contiguous: a case is one run of bytes, read at the speed of the disk
            array = file.create_dataset(name, (rows[name], size, size), kind)
            if rows[name]:
                array[-1] = 0  # HDF5 allocates no space for what was never written
        for name, length in lengths.items():
            file.create_dataset(name, data=np.array(b"", f"S{length}"))
        file.attrs.update({name: wanted[name] for name in ("schema", *PREPROCESSING)})
        file.attrs["made_from"] = made_from


def _preprocess(case, size, spacing, crop, file, images_at, labels_at):
    """Write one case's images (T * Z, S, S) float16 and, if any, labels (2 * Z, S, S) uint8 into `file` at
    these byte offsets. Returns {"place": {crop centre, share cropped, digests of the labels}, "warnings"}, or
    {"problem"} if the case cannot be used.
    """
    try:
        image, labels, warnings = load_case(case)
        if {image.shape, *((*each.shape, case.shape[3]) for each in labels.values())} != {case.shape}:
            raise InputError(f"{case.code}: {case.image}: changed while it was read; start again")
    except InputError as error:
        return {"problem": str(error)}
    images, grid = cine_to_slices(image, case.spacing, size, spacing, crop)
    pieces = {images_at: images}
    place = {"crop_centre": grid.centre, "cropped": 0.0, "digests": ()}
    if case.ed is not None:
        planes = np.concatenate([labels[frame].transpose(2, 0, 1) for frame in (case.ed, case.es)])
        foreground = planes > 0
        place["cropped"] = 1 - float((foreground & grid.inside()).sum() / foreground.sum())
        pieces[labels_at] = grid.labels_to_slices(planes)
        # of the labels on file: resampled slices may differ in rounding between CPUs
        place["digests"] = [digest(np.ascontiguousarray(labels[frame].T)) for frame in (case.ed, case.es)]
    write_in_place(file, pieces)
    return {"place": place, "warnings": warnings}
