"""New scans without labels: masks on their own grid, volumes of every frame, ejection fraction and mass."""

import collections

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from cardiac import LABELS, REGIONS
from cardiac.checkpoint import weights_digest
from cardiac.evaluation import heart_function, regions_on_own_grid
from cardiac.files import InputError, file_error, printable, read_json, write_csv, write_json
from cardiac.metrics import largest_component, volume_ml
from cardiac.nifti import read_header, read_image, spacing_of, write_labels
from cardiac.preprocessing import cine_to_slices, most_likely
from cardiac.report import COLOURS, heart_box, save_figure, show_slice
from cardiac.run import EMPTIED, describe, run_lock

VOLUMES = ("frame", "time_ms", *(f"{region}_ml" for region in REGIONS))
SUFFIXES = (".nii.gz", ".nii")
NOT_IMAGES = ("_gt", "_pred")  # endings of label files beside the images: the expert's and ours


def find_scans(paths):
    """{name: file} of NIfTI files, given or found recursively in folders; names are unique, fit for folders.

    Label files (*_gt, *_pred) in folders are left out. Raises InputError for a folder without NIfTI files,
    and for a missing file.
    """
    files = {}  # by what they resolve to: a link keeps its own name, not its target's
    for path in paths:
        if not path.exists():
            raise InputError(f"{printable(path)}: no such file or folder")
        inside, what = [path] if _stem(path) else [], "not the name of a NIfTI file (.nii, .nii.gz)"
        if path.is_dir():
            named = (f for f in path.rglob("*") if _stem(f) and not _stem(f).endswith(NOT_IMAGES))
            inside = sorted(file for file in named if not file.is_dir())
            what = "no NIfTI file (.nii, .nii.gz) in this folder"
        if not inside:
            raise InputError(f"{printable(path)}: {what}")
        for file in inside:
            files.setdefault(file.resolve(), file.parent.resolve() / file.name)
    stems, scans = collections.Counter(map(_stem, files.values())), {}
    for file in files.values():
        name = _stem(file) if stems[_stem(file)] == 1 else f"{file.parent.name}_{_stem(file)}"
        if name in scans:
            raise InputError(f"{printable(file)}: has the same name as {printable(scans[name])}; rename one")
        scans[name] = file
    return scans


def _stem(file):
    """The name of a NIfTI file without its suffix, "" for other and hidden files."""
    suffix = next((suffix for suffix in SUFFIXES if file.name.lower().endswith(suffix)), None)
    return file.name[: -len(suffix)] if suffix and not file.name.startswith(".") else ""


def predict_scans(scans, model, network, progress, settings, device):
    """Segment every frame of `scans` {name: file}; all results are written below OUT/predictions.

    Each scan has a folder NAME with the mask, volumes.csv, volumes.png and summary.json, which is written
    last and marks the scan as finished; summary.csv beside them has a row per finished scan, without its
    path. An unreadable scan is an InputError; with --skip-bad it is reported, its earlier results stay, and
    it is an error only if no scan can be read.
    """
    folder = settings.out / "predictions"
    with run_lock(settings, "predictions"):
        skipped = []
        model_identity = {"model": model, "steps": progress.step, "weights": weights_digest(network)}
        model_identity |= {name: getattr(settings, name) for name in ("largest_component", "mirrored")}

        def skip(error):
            if not settings.skip_bad:
                way_out = "; --skip-bad leaves it out" if len(scans) > 1 else ""
                raise InputError(f"{error}{way_out}") from error
            skipped.append(error)
            tqdm.write(f"skipped: {error}")

        work = _unfinished(scans, folder, model_identity, settings.overwrite, skip)
        if work:
            print(f"{model}, {progress.step} steps, on {describe(device)}")
        for name, file, made_from in tqdm(work, "scans", unit="scan", disable=not work):
            try:
                found = predict_scan(folder / name, file, network, settings, device)
            except InputError as error:
                skip(error)
                continue
            write_json(folder / name / "summary.json", {"scan": name, **found, "made_from": made_from})
            tqdm.write(_result_line(name, found))
        _write_table(folder)
        if len(skipped) == len(scans):
            raise InputError(f"none of the scans can be read: {skipped[0]}")
    print(f"to look at: {folder}/*/volumes.png; all scans: {folder / 'summary.csv'}")


def _unfinished(scans, folder, model_identity, overwrite, skip):
    """The scans still to be segmented, [(name, file, made_from)]; a header's InputError goes to `skip`."""
    work = []
    for name, file in scans.items():
        try:
            spacing_of(read_header(file, (3, 4)), file)
        except InputError as error:
            skip(error)
            continue
        status, summary = file.stat(), folder / name / "summary.json"
        made_from = {"file": str(file.resolve()), "bytes": status.st_size, "modified": status.st_mtime_ns}
        made_from |= model_identity
        known = summary.exists() and not overwrite
        done = read_json(summary).get("made_from") if known else None
        if done == made_from:
            print(f"{summary.parent}: finished; use --overwrite to redo it")
        elif done and done.get("file") != made_from["file"]:
            raise InputError(f"{summary.parent}: made from {done.get('file')}; --overwrite replaces it")
        else:
            work.append((name, file, made_from))
    if overwrite:
        for name, _, made_from in work:  # all, before the first is redone
            _make_stale(folder / name / "summary.json", made_from["file"])
        EMPTIED.add(folder)
    return work


def _make_stale(summary, file):
    """Mark a finished scan as outdated, its results kept: `file` is redone even without --overwrite."""
    try:
        found = read_json(summary) if summary.exists() else {}
    except InputError:  # a damaged one is of no use
        summary.unlink()
        return
    if "made_from" in found:
        write_json(summary, found | {"made_from": found["made_from"] | {"file": file, "modified": None}})


def _write_table(folder):
    """Write summary.csv from all scans' summary.json: results and the model, which may differ by scan."""
    rows = [read_json(path) for path in sorted(folder.glob("*/summary.json"))]
    rows = [row for row in rows if "made_from" in row]
    how = ("model", "steps", "largest_component")
    rows = [row | {name: row["made_from"].get(name) for name in how} for row in rows]
    if rows:
        write_csv(folder / "summary.csv", [name for name in rows[0] if name != "made_from"], rows)


def predict_scan(folder, file, network, settings, device):
    """Segment one scan; remove summary.json, then write mask, volumes.csv and volumes.png to `folder`.

    Returns a dict: ED and ES (zero-based frames of the largest and the smallest LV found) and the quantities
    of `heart_function`, None if they need a region that was not found, or two frames with LV; counts of
    frames. Slices are made exactly as for the cache.
    """
    header, image = read_header(file, (3, 4)), read_image(file, (3, 4))
    if image.dtype.kind in "iu" and image.min() >= 0 and image.max() <= len(LABELS):
        raise file_error(file, f"no voxel is larger than {len(LABELS)}: labels, not an image; pass the image")
    spacing, dimensions = spacing_of(header, file), image.ndim
    image = image.reshape(*image.shape[:3], -1)
    slices, grid = cine_to_slices(image, spacing, settings.size, settings.spacing, settings.crop)
    slices = torch.from_numpy(slices).unflatten(0, (image.shape[3], image.shape[2]))[:, :, None]
    labels = np.zeros(image.shape, np.uint8, order="F")
    for frame, regions in enumerate(regions_on_own_grid(network, slices, grid, device)):
        prediction = most_likely(regions)
        labels[..., frame] = largest_component(prediction) if settings.largest_component else prediction
    each = np.moveaxis(labels, -1, 0)
    volumes = [{region: volume_ml(one == k, spacing) for region, k in LABELS.items()} for one in each]
    cavity = np.array([volume["LV"] for volume in volumes])
    ed, es = int(cavity.argmax()), int(np.where(cavity > 0, cavity, np.inf).argmin())  # volume 0: no LV found
    phases = {"ED": ed if cavity[ed] else None, "ES": es if es != ed else None}  # None: no LV in two frames
    known = {}  # NaN if not found in that phase or at ED, as is all that needs it
    for phase, t in phases.items():
        for region in REGIONS:
            there = t is not None and volumes[ed][region] and volumes[t][region]
            known[phase, region] = volumes[t][region] if there else np.nan
    found = {name: None if np.isnan(value) else value for name, value in heart_function(known).items()}
    found = {**phases, **found, "frames": len(slices), "frames_without_LV": int((cavity == 0).sum())}

    times = _times(header, len(slices))
    rows = [dict(zip(VOLUMES, (t, times[t], *volume.values()))) for t, volume in enumerate(volumes)]
    (folder / "summary.json").unlink(missing_ok=True)
    write_labels(folder / f"{folder.name}_pred.nii.gz", labels if dimensions == 4 else labels[..., 0], file)
    write_csv(folder / "volumes.csv", VOLUMES, rows)
    title = _result_line(folder.name, found)
    draw_volumes(folder / "volumes.png", image, labels, rows, (ed, es), spacing, title)
    return found


def _times(header, frames):
    """Time of each frame in ms, from the header's time step; None if it, or its unit, is missing."""
    unit = {8: 1000, 16: 1, 24: 0.001}.get(int(header["xyzt_units"]) & 56)  # s, ms, microseconds
    step = float(header["pixdim"][4])
    known = unit and frames > 1 and 0 < step < float("inf")
    return [frame * step * unit if known else None for frame in range(frames)]


def _result_line(name, found):
    """The results of a scan on one line."""
    missing = f"; no LV in {found['frames_without_LV']} of {found['frames']} frames"
    if found["ED"] is None:
        return name + missing
    text = f"{name}: ED {found['ED']}, EDV {found['LV_EDV_ml']:.1f} ml"
    if found["LV_mass_g"] is not None:
        text += f", mass {found['LV_mass_g']:.1f} g"
    if found["ES"] is not None:
        text += f", ES {found['ES']}, ESV {found['LV_ESV_ml']:.1f} ml, SV {found['LV_SV_ml']:.1f} ml"
        text += f", EF {found['LV_EF_percent']:.1f} %"
    return text + missing if found["frames_without_LV"] else text


def draw_volumes(path, image, labels, rows, phases, spacing, title):
    """volumes.png: the volumes over time, and three slices at ED and at ES with their contours.

    image, labels: (X, Y, Z, T); rows: of volumes.csv; phases: frames of ED and ES.
    """
    figure = Figure((11, 4.2), layout="constrained")
    curves, pictures = figure.subfigures(1, 2, width_ratios=(1, 1))
    times = [row["frame"] if row["time_ms"] is None else row["time_ms"] for row in rows]
    axes = curves.subplots()
    for region, colour in COLOURS.items():
        axes.plot(times, [row[f"{region}_ml"] for row in rows], ".-", color=colour, label=region)
    frames = dict(zip(dict.fromkeys(phases), ("ED", "ES")))
    for frame, phase in frames.items():
        axes.axvline(times[frame], color="gray", linewidth=0.8, linestyle=":")
        axes.text(times[frame], 1, phase, transform=axes.get_xaxis_transform(), ha="center", va="bottom")
    unit = "frame" if rows[0]["time_ms"] is None else "time [ms]"
    axes.set(xlabel=unit, ylabel="volume [ml]", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    box = heart_box(labels, spacing)
    filled = np.flatnonzero(labels.any(axis=(0, 1, 3))) if labels.any() else np.arange(image.shape[2])
    slices = np.unique(filled[np.round(np.array((0.15, 0.5, 0.85)) * (len(filled) - 1)).astype(int)])
    grid = pictures.subplots(len(frames), len(slices), squeeze=False)
    look = {"vmax": np.percentile(image, 99), "aspect": spacing[1] / spacing[0]}
    for line, (frame, phase) in zip(grid, frames.items()):
        for axes, z in zip(line, slices):
            plane, contours = image[..., z, frame][box], labels[..., z, frame][box]
            show_slice(axes, plane, contours, f"{phase}, slice {z}", **look)
    figure.suptitle(title, fontsize=9, parse_math=False)
    save_figure(figure, path)
