"""Predictions on each case's own grid, their scores, and the tables made of them."""

import numpy as np
import torch

from cardiac import REGIONS
from cardiac.cache import most_likely
from cardiac.cases import VENDORS, load_labels
from cardiac.metrics import paper_dice, score_case
from cardiac.networks import segment
from cardiac.nifti import write_labels
from cardiac.slices import SliceStore
from cardiac.workers import worker_pool

CASES = (
    "model", "case", "vendor", "centre", "phase", "region",
    "dice", "hd95_mm", "assd_mm", "volume_ml", "reference_volume_ml", "paper_dice",
)  # fmt: skip
TABLE = ("model", *REGIONS, *VENDORS, "total")


def probabilities_on_own_grid(network, store, case, frame):
    """Softmax of LV, MYO, RV (3, Z, X, Y) of a frame, resampled to the case's own grid; 0 outside the crop.
    """
    probabilities = segment(network, store.images(torch.from_numpy(case.rows(frame))))[:, 1:]
    return case.grid(store.cache).from_slices(probabilities.transpose(0, 1).cpu().numpy())


def predict(network, store, frames):
    """Labels (X, Y, Z, T) uint8 of the one case in `store`, 0 in other frames, and {frame: softmax (4, X, Y,
    Z)}.
    """
    (case,) = store.cases
    labels, softmax = np.zeros(case.shape, np.uint8), {}
    for frame in frames:
        regions = probabilities_on_own_grid(network, store, case, frame).transpose(0, 2, 3, 1)
        labels[..., frame] = most_likely(regions)
        softmax[frame] = np.concatenate([1 - regions.sum(0, keepdims=True), regions])
    return labels, softmax


def score_model(model, network, cache, cases, settings, device, folder):
    """Predict and score `cases` with one model: writes predictions below `folder`, yields the rows of
    cases.csv.
    """

    def jobs():
        for case in cases:
            store = SliceStore(cache, [case], device)
            frames = range(case.frames) if settings.all_frames else (case.ed, case.es)
            prediction, softmax = predict(network, store, frames)
            softmax = {frame: softmax[frame] for frame in (case.ed, case.es)}
            yield case, prediction, softmax, folder / f"{case.code}_sa_pred.nii.gz"

    with worker_pool(settings.workers, len(cases)) as run:
        for case, scores in zip(cases, run(_write_and_score, jobs())):
            for (phase, region), values in scores.items():
                row = {"model": model, "case": case.code, "vendor": case.vendor, "centre": case.centre}
                yield {**row, "phase": phase, "region": region, **values}


def _write_and_score(case, prediction, softmax, path):
    write_labels(path, prediction, case.image)
    references, scores = load_labels(case), {}
    for phase, frame in (("ED", case.ed), ("ES", case.es)):
        regions = score_case(prediction[..., frame], references[frame], case.spacing)
        soft = paper_dice(softmax[frame], references[frame])
        scores |= {(phase, region): {**regions[region], "paper_dice": soft[region]} for region in REGIONS}
    return scores


def table_row(model, rows, score="dice"):
    """Table 1's row of a model: the plain mean of the non-NaN scores by region, by vendor and in all."""

    def mean(chosen):
        values = [row[score] for row in chosen if not np.isnan(row[score])]
        return float(np.mean(values)) if values else float("nan")

    row = {"model": model}
    row |= {region: mean(r for r in rows if r["region"] == region) for region in REGIONS}
    row |= {vendor: mean(r for r in rows if r["vendor"] == vendor) for vendor in VENDORS}
    return {**row, "total": mean(rows)}


def failures(rows):
    """Rows whose region one mask lacks and the other has, and the count of regions that both lack."""
    missing = [row for row in rows if row["dice"] == 0 and np.isnan(row["hd95_mm"])]
    return missing, sum(np.isnan(row["dice"]) for row in rows)


def table_text(table, steps, seen, markdown=False):
    """Table 1 as aligned text or Markdown: a row a model, the gain of `propagated` over `original`, the
    steps.
    """
    names = [*TABLE, "steps"]
    lines = [[row["model"], *(_number(row[name]) for name in TABLE[1:]), str(steps[row["model"]])] for row in table]
    by_model = {row["model"]: row for row in table}
    if {"original", "propagated"} <= by_model.keys():
        gains = [by_model["propagated"][name] - by_model["original"][name] for name in TABLE[1:]]
        lines.append(["gain", *(_number(gain, "+.3f") for gain in gains), ""])
    names = [f"{name} *" if name in VENDORS and name not in seen else name for name in names]
    if markdown:
        rule = ["---", *["---:"] * (len(names) - 1)]
        return "\n".join("| " + " | ".join(line) + " |" for line in [names, rule, *lines])
    widths = [max(len(line[k]) for line in [names, *lines]) for k in range(len(names))]
    return "\n".join(
        "  ".join(cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(line, widths)))
        for line in [names, *lines]
    )


def caption(cache, cases, settings, rows, seen):
    """What Table 1 is a table of, in words: cases, vendors that training saw, what is not defined or failed.
    """
    unlabelled = {case.vendor for case in cache.split("Training") if not case.labelled} - seen
    missing, absent = failures(rows)
    text = (f"Dice in 3-D on each case's own grid, mean over case, phase (ED, ES) and region; {len(cases)} cases of "
            f"{settings.split}. Labels of vendor {', '.join(sorted(seen))} were trained on; * marks the others.")  # fmt: skip
    if unlabelled:
        text += f" The registration saw unlabelled scans of vendor {', '.join(sorted(unlabelled))}."
    if absent:
        text += f" {absent} scores are not defined (region absent from both masks) and left out."
    if missing:
        names = ", ".join(dict.fromkeys(f"{row['model']} {row['case']} {row['phase']} {row['region']}" for row in missing))
        text += f" {len(missing)} failures (region in one mask alone, Dice 0): {names}."
    return text


def _number(value, form=".3f"):
    return "" if np.isnan(value) else format(value, form)
