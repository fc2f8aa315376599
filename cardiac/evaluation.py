"""Predictions on each case's own grid, their scores, and the tables made from them."""

import dataclasses
import math

import numpy as np
import torch

from cardiac import REGIONS, metrics
from cardiac.cache import Cache
from cardiac.cases import VENDORS, load_labels
from cardiac.files import InputError, read_csv
from cardiac.networks import segment
from cardiac.nifti import write_labels
from cardiac.parts import NO_PARTS
from cardiac.preprocessing import most_likely
from cardiac.settings import MAY_CHANGE, PER_CALL, SegmentationSettings
from cardiac.slices import SliceStore
from cardiac.workers import worker_pool

MODELS = ("original", "propagated")
SLICES_AT_ONCE = 64
SCORES = (*metrics.SCORES, "paper_dice")
CASES = ("model", "case", "vendor", "centre", "phase", "region", *SCORES)
TABLE = ("model", *REGIONS, *VENDORS, "total")
CLINICAL = ("model", "case", "vendor", "quantity", "measured", "reference")
AGREEMENT = ("model", "quantity", "bias", "loa_low", "loa_high", "r", "mae", "n")
FAILURE_COLUMNS = ("model", "case", "phase", "region")  # columns that identify one
COMPARISON = ("group", "mean_difference", "low", "high", "p", "n")


# -------------------------------------------------------------------------------- predictions, scores


def regions_on_own_grid(network, frames, grid, device):
    """Yield softmax of LV, MYO, RV (3, X, Y, Z), 0 outside the crop, of each of `frames` (F, Z, 1, S, S).

    Slices of several frames go through the network together, but no more than fill a GPU, so that memory does
    not grow with the cine.
    """
    slices = frames.shape[1]
    for chunk in frames.split(max(1, SLICES_AT_ONCE // slices)):
        regions = segment(network, chunk.flatten(0, 1).to(device).float())[:, 1:]
        for planes in regions.unflatten(0, (-1, slices)).transpose(1, 2).cpu().numpy():
            yield grid.from_slices(planes).transpose(0, 2, 3, 1)


def predict(network, store, frames):
    """Segment `frames` of the one case in `store`: labels (X, Y, Z, T) uint8, 0 in all other frames, and
    {frame: softmax (4, X, Y, Z)} of ED and ES.
    """
    (case,) = store.cases
    labels, softmax = np.zeros(case.shape, np.uint8, order="F"), {}  # as in NIfTI
    slices = store.images(torch.from_numpy(np.concatenate([case.rows(frame) for frame in frames])))
    slices, grid = slices.unflatten(0, (len(frames), case.slices)), case.grid(store.cache)
    for frame, regions in zip(frames, regions_on_own_grid(network, slices, grid, store.device)):
        labels[..., frame] = most_likely(regions)
        if frame in case.phases.values():
            softmax[frame] = np.concatenate([1 - regions.sum(0, keepdims=True), regions])
    return labels, softmax


def prediction_path(folder, code):
    """The file of a case's prediction, in the folder of a model's predictions."""
    return folder / f"{code}_sa_pred.nii.gz"


def score_model(model, network, cache, cases, settings, device, folder, parts=NO_PARTS):
    """Predict and score `cases` with one model: writes predictions below `folder`, yields (row of cases.csv,
    the same row for the largest components or None). parts: where the scores of finished cases are kept.
    """

    def predicted(case):
        store = SliceStore(cache, [case], device, place="file")  # often only two of all frames are read
        frames = range(case.frames) if settings.all_frames else (case.ed, case.es)
        prediction, softmax = predict(network, store, frames)
        return case, prediction, softmax, prediction_path(folder, case.code), settings.largest_component

    with worker_pool(settings.workers, len(cases)) as run:
        for case, found in zip(cases, parts.results(run, _write_and_score, cases, predicted)):
            start = {"model": model, "case": case.code, "vendor": case.vendor, "centre": case.centre}
            for where, values, largest in found["scores"]:
                row = {**start, **where}
                yield {**row, **values}, largest and {**row, **largest}


def _write_and_score(case, prediction, softmax, path, largest):
    write_labels(path, prediction, case.image)
    references, scores = load_labels(case), []
    for phase, frame in case.phases.items():
        labels, reference = prediction[..., frame], references[frame]
        whole = metrics.score_case(labels, reference, case.spacing)
        kept = largest and metrics.score_case(metrics.largest_component(labels), reference, case.spacing)
        soft = metrics.paper_dice(softmax[frame], reference)
        for region in REGIONS:
            where, soft_dice = {"phase": phase, "region": region}, {"paper_dice": soft[region]}
            scores.append((where, {**whole[region], **soft_dice}, kept and {**kept[region], **soft_dice}))
    return {"scores": scores}


def read_scores(path):
    """The rows of a cases.csv, numbers as floats and empty cells NaN. Raises InputError."""
    try:
        rows = [{name: row[name] for name in CASES} for row in read_csv(path)]
        return [row | {name: float(row[name] or "nan") for name in SCORES} for row in rows]
    except (KeyError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not scores of this program; use --overwrite to redo them") from error


# -------------------------------------------------------------------------------- results


@dataclasses.dataclass
class Results:
    """All that is reported; its numbers are computed only from the rows of cases.csv, a list of mappings."""

    rows: list  # cases.csv
    largest: list | None  # the same for the largest components, with --largest-component
    cache: Cache  # of the dataset; if it is the `own`, with the labels known in training
    cases: list  # that were scored
    split: str
    trained: dict  # {model: {"steps", "best" (validation Dice), "settings" (of the run)}}
    own: bool  # whether the models were trained on this dataset

    def __post_init__(self):
        self.models = list(self.trained)
        self.used = self.trained[self.models[0]]["settings"]  # read only for what the runs have in common
        training, validation = self.cache.split("Training"), []
        if self.own and any(case.labelled for case in training):
            chosen = self.used["seed"], self.used["held_out"]
            training, validation, _ = self.cache.training_and_validation(*chosen, finished=True)
        self.learnt_from = [case for case in training if case.labelled]
        self.validated = {case.code for case in validation}  # cases that chose the checkpoints
        self.seen = {case.vendor for case in self.learnt_from}  # vendors whose labels were trained on
        self.unlabelled = {case.vendor for case in training} - self.seen
        self.table = self._table(self.rows, "dice")
        self.table_paper = self._table(self.rows, "paper_dice")
        self.table_largest = self._table(self.largest, "dice") if self.largest else []
        self.clinical = clinical(self.rows)
        self.agreement = [
            {"model": model, "quantity": name, **metrics.agreement(*self.measured(model, name))}
            for name in dict.fromkeys(row["quantity"] for row in self.clinical)
            for model in self.models
        ]
        self.comparison = comparison(self.rows) if len(self.models) == 2 else []
        self.failures, self.undefined = failures(self.rows)

    def _table(self, rows, score):
        return [table_row(model, [r for r in rows if r["model"] == model], score) for model in self.models]

    def measured(self, model, quantity):
        """Two arrays (N,), one number per case: a clinical quantity by a model and by the expert."""
        rows = [row for row in self.clinical if (row["model"], row["quantity"]) == (model, quantity)]
        return tuple(np.array([row[name] for row in rows]) for name in ("measured", "reference"))

    def case_dice(self, model):
        """{case: mean Dice over its phases and regions}, NaN left out, of one model, in the order scored."""
        return _case_dice([row for row in self.rows if row["model"] == model])

    def ranked(self, model):
        """{"best", "median", "worst": code} of a model; ties by code."""
        scores = self.case_dice(model)
        codes = sorted(scores, key=lambda code: (-np.nan_to_num(scores[code]), code))
        return {"best": codes[0], "median": codes[len(codes) // 2], "worst": codes[-1]}

    def summary(self):
        """The numbers for summary.json: tables, agreement, comparison, failures."""
        tables = ("table", "table_paper", "table_largest", "agreement", "comparison", "failures")
        counts = {"dataset": self.cache.name, "cases": len(self.cases), "undefined": self.undefined}
        return counts | {name: getattr(self, name) for name in tables}

    @property
    def differing_settings(self):
        """The settings, except those of the length of training, in which the two models differ, as texts."""
        runs, found = [run["settings"] for run in self.trained.values()], []
        for name in (item.name for item in dataclasses.fields(SegmentationSettings)):
            values = [str(run.get(name)) for run in runs]
            # other held-out patients are other cases, which evaluate.py refuses
            if name not in (*PER_CALL, *MAY_CHANGE, "held_out") and len(set(values)) > 1:
                found.append(f"{name} ({', '.join(values)})")
        return found

    @property
    def labels(self):
        """The expert labels that were trained on, in words."""
        known = self.used["labelled_phases"]
        text = "expert labels of ED and ES" if known == "both" else f"expert labels of {known} only"
        return f"{text}, {counted(len(self.learnt_from), 'patient')}" if self.own else text

    def starred(self, name):
        """The name of a column, with a * for vendors whose labels were not trained on."""
        return f"{name} *" if self.own and name in VENDORS and name not in self.seen else name

    def cells(self, table):
        """A table as rows of text: names, a row per model, the gain of `propagated` over `original`; the last
        column is the steps. A * marks vendors not trained on.
        """
        names = [self.starred(name) for name in TABLE]
        lines = [[row["model"], *(number(row[name]) for name in TABLE[1:])] for row in table]
        if len(table) == 2:
            original, propagated = table
            lines.append(["gain", *(number(propagated[name] - original[name], "+.3f") for name in TABLE[1:])])
        steps = ["steps", *(str(self.trained[row["model"]]["steps"]) for row in table), ""]
        return [[*line, step] for line, step in zip([names, *lines], steps)]

    def caption(self):
        """The caption of Table 1: cases, vendors trained on, failures."""
        text = ("Dice in 3-D on each case's own grid, mean over cases, phases (ED, ES) and regions; "
                f"{counted(len(self.cases), 'case')} of {self.split} of {self.cache.name}.")
        if self.own and self.split != "Testing":
            scored = {case.code for case in self.cases}
            known = scored & {case.code for case in self.learnt_from}
            text += f" THE NETWORKS WERE TRAINED ON {len(known)} OF THESE CASES." if known else ""
            if scored & self.validated:
                text += " Some were used in validation, which chose the checkpoints."
        if len({run["steps"] for run in self.trained.values()}) > 1:
            text += " THE NETWORKS WERE TRAINED FOR DIFFERENT NUMBERS OF STEPS."
        if self.differing_settings:
            text += f" BESIDES THEIR LABELS, THE NETWORKS DIFFER IN {'; '.join(self.differing_settings)}."
        if self.own:
            vendors = ", ".join(sorted(self.seen))
            text += f" Trained on {self.labels}, of vendor {vendors}; * marks the others."
            if self.unlabelled and "propagated" in self.models:
                vendors = ", ".join(sorted(self.unlabelled))
                text += f" The registration saw unlabelled scans of vendor {vendors}."
        else:
            text += " The models were trained on another dataset, or on other cases of this one."
        if self.cache.skipped:
            text += f" {len(self.cache.skipped)} left out with --skip-bad: {'; '.join(self.cache.skipped)}."
        if self.undefined:
            text += f" {self.undefined} scores are undefined (region absent from both masks) and left out."
        if self.failures:
            names = [" ".join(row[name] for name in FAILURE_COLUMNS) for row in self.failures]
            more = f" and {len(names) - 8} more, see summary.json" if len(names) > 8 else ""
            text += f" {len(names)} failures (region in only one mask, Dice 0): "
            text += f"{', '.join(names[:8])}{more}."
        return text

    def gain(self):
        """The gain of `propagated` with its interval and p-value, in words; "" if there is only one model."""
        if not self.comparison:
            return ""
        found = self.comparison[0]
        gain, low, high = (number(found[name], "+.4f") for name in ("mean_difference", "low", "high"))
        text = f"propagated - original: mean Dice per patient {gain}"
        if not low:  # not defined for a single patient
            return f"{text}, {counted(found['n'], 'patient')}"
        return (f"{text} (95 % interval {low} to {high}, bootstrap over {found['n']} patients, one training "
                f"each; Wilcoxon {p_text(found['p'])})")


def table_row(model, rows, score="dice"):
    """Table 1's row of a model: the plain mean of the non-NaN scores by region, by vendor and overall."""
    row = {"model": model}
    for name in TABLE[1:]:
        row[name] = mean(r[score] for r in rows if name in (r["region"], r["vendor"], "total"))
    return row


def mean(values):
    values = [value for value in values if not np.isnan(value)]
    return float(np.mean(values)) if values else float("nan")


def _case_dice(rows):
    scores = {}
    for row in rows:
        scores.setdefault(row["case"], []).append(row["dice"])
    return {case: mean(values) for case, values in scores.items()}


def heart_function(volumes):
    """Clinical quantities by name, from volumes {(phase, region): ml}: EDV, ESV and stroke volume (ml) and
    ejection fraction (%) of both ventricles, and the mass of the myocardium at ED (g).
    """
    found = {}
    for region in ("LV", "RV"):
        edv, esv = volumes["ED", region], volumes["ES", region]
        found |= {f"{region}_EDV_ml": edv, f"{region}_ESV_ml": esv, f"{region}_SV_ml": edv - esv}
        found[f"{region}_EF_percent"] = metrics.ejection_fraction(edv, esv)
    return {**found, "LV_mass_g": metrics.MYOCARDIUM_DENSITY * volumes["ED", "MYO"]}


def clinical(rows):
    """`heart_function` of prediction and reference for every model and case: rows of clinical.csv."""
    cases, found = {}, []
    for row in rows:
        cases.setdefault((row["model"], row["case"], row["vendor"]), []).append(row)
    for key, own in cases.items():
        names = ("volume_ml", "reference_volume_ml")
        volumes = ({(row["phase"], row["region"]): row[name] for row in own} for name in names)
        measured, reference = map(heart_function, volumes)
        found += [dict(zip(CLINICAL, (*key, name, measured[name], reference[name]))) for name in measured]
    return found


def comparison(rows):
    """Mean Dice per patient, `propagated` minus `original`: overall, by vendor and by region, as rows."""
    found = []
    for group in ("all", *VENDORS, *REGIONS):
        if own := [row for row in rows if group in ("all", row["vendor"], row["region"])]:
            scores = [_case_dice([row for row in own if row["model"] == model]) for model in MODELS]
            found.append({"group": group, **metrics.paired_comparison(*scores)})
    return found


def failures(rows):
    """Rows whose region is in only one of the masks, and the number of regions absent from both."""
    missing = [row for row in rows if row["dice"] == 0 and np.isnan(row["hd95_mm"])]
    return missing, sum(math.isnan(row["dice"]) for row in rows)


def aligned(lines, markdown=False):
    """Rows of cells as aligned text or Markdown."""
    if markdown:
        lines = [lines[0], ["---", *["---:"] * (len(lines[0]) - 1)], *lines[1:]]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    first, *widths = (max(map(len, column)) for column in zip(*lines))
    rest = ("  ".join(map(str.rjust, line[1:], widths)) for line in lines)
    return "\n".join(f"{line[0].ljust(first)}  {cells}" for line, cells in zip(lines, rest))


def counted(count, noun):
    """A number with its noun: "1 case", "2 cases"."""
    return f"{count} {noun}{'s' * (count != 1)}"


def quantity_label(quantity):
    """A clinical quantity, "LV_EF_percent", as "LV EF, %"."""
    name, _, unit = quantity.replace("percent", "%").rpartition("_")
    return f"{name.replace('_', ' ')}, {unit}"


def p_text(p):
    """A p-value as papers print it."""
    return "p < 0.001" if p < 0.001 else f"p = {number(p) or 'not defined'}"


def number(value, form=".3f"):
    """A number as text, "" for NaN."""
    return "" if np.isnan(value) else format(value, form)
