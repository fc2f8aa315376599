"""evaluation/report.html: one self-contained file to look at, made from the template beside this module.

Whatever comes from outside (codes, centres, folder names) is escaped here; the page's script inserts it as
text, never as HTML, and the page's content security policy forbids loading anything.
"""

import base64
import io
import json
import re
from html import escape
from pathlib import Path

import numpy as np
from contourpy import contour_generator
from PIL import Image

from cardiac import LABELS, REGIONS
from cardiac.cases import VENDORS, load_case
from cardiac.evaluation import FAILURE_COLUMNS, MODELS, counted, mean, number, p_text, quantity_label
from cardiac.files import write_text
from cardiac.preprocessing import intensity_window
from cardiac.propagation import Propagated
from cardiac.report import COLOURS, heart_box, labelled_cine, median_case, quality_lines, read_prediction

COMPARISON_NOTE = (
    "Difference in mean Dice per patient; bootstrap over patients; p not corrected for multiple tests. Where "
    "the expert lacks a region, a network that finds none has no score, and one that finds some has 0."
)
NOT_SHOWN = "The labels in propagation/ are not those that the networks were trained on, and are not shown."


def write_report(folder, results, view, all_frames, out):
    """Write report.html of the evaluation in `folder`.

    view: codes to show besides the best, median and worst. all_frames: whether every frame was predicted.
    out: folder of the run if it was trained on this dataset, otherwise None.
    """
    chosen = {}
    for model in results.models:
        for rank, code in results.ranked(model).items():
            chosen.setdefault(code, []).append(f"{rank} of {model}")
    for code in view:
        chosen.setdefault(code, [])
    known = {case.code: case for case in results.cases}
    views = [_case_view(folder, results, known[code], why, all_frames) for code, why in chosen.items()]
    title = f"{' and '.join(results.models)} on {results.split} of {results.cache.name}"
    caption = f"<p class=soft>{escape(results.caption())}</p>"
    sections = {
        "": f"<h1>{escape(title)}</h1>" + _summary(results),
        "Table 1": _table(results.cells(results.table)) + caption,
        "Table 1, largest components": _table(results.cells(results.table_largest)),
        "Gain of the propagated labels": results.comparison
        and _table(_comparison(results)) + f"<p class=soft>{COMPARISON_NOTE}</p>",
        "Dice by region and vendor": _picture(folder / "dice.png", "Dice by region and vendor"),
        "Volumes and function against the expert": _agreement(results)
        + _picture(folder / "bland_altman.png", "Bland-Altman plots of LV EDV, LV ESV and LV EF"),
        "Cases to look at": _viewer("cases", views),
        "Propagated labels": out and _propagation(results, out / "propagation"),
        "Training": out and _training(out),
        "All cases": _cases(results, list(chosen)),
    }
    body = "\n".join(f"<h2>{head}</h2>{text}" if head else text for head, text in sections.items() if text)
    template = Path(__file__).with_name("report.html").read_text()
    parts = {"title": escape(title), "body": body, "colours": json.dumps(COLOURS)}
    write_text(folder / "report.html", re.sub("<!--(\\w+)-->", lambda found: parts[found[1]], template))


# ---------------------------------------------------------------------------------- numbers as HTML


def _table(lines, sortable=False):
    """Rows of text, names first, as an HTML table; a cell may be (text, index of the view to open)."""
    head, *rows = lines
    if not rows:
        return ""
    button = '<button type="button">{}</button>' if sortable else "{}"
    names = "".join(f'<th scope="col">{button.format(escape(name))}</th>' for name in head)
    body = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    table = f"<table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _cell(cell):
    if isinstance(cell, tuple):
        return f'<button type="button" class="open" data-view="{cell[1]}">{escape(cell[0])}</button>'
    return escape(cell)


def _summary(results):
    """The main figures as cards, and what each network was trained on."""
    cards = {f"Dice, {row['model']}": number(row["total"]) for row in results.table}
    if results.comparison:
        _, n, gain, interval, p = _comparison(results)[1]
        cards["gain in Dice per patient"] = gain
        if interval:
            cards |= {"95 % interval of the gain": interval, f"Wilcoxon, {n} patients": p}
    cards["regions in only one mask"] = str(len(results.failures))
    boxes = "".join(f"<div><b>{escape(value)}</b>{escape(name)}</div>" for name, value in cards.items())
    labels = {"original": results.labels, "propagated": f"{results.labels}, and propagated labels"}
    lines = [["network", "trained on", "dataset", "steps", "validation Dice", "slices"]]
    for model, run in results.trained.items():
        used = run["settings"]
        grid = f"{used['size']} x {used['size']} at {used['spacing']:g} mm"
        data = Path(used["data"]).name
        lines.append([model, labels[model], data, str(run["steps"]), number(run["best"]), grid])
    vendors = [case.vendor for case in results.cases]
    counts = ", ".join(f"{vendors.count(v)} {v} ({VENDORS[v]})" for v in VENDORS if v in vendors)
    text = f"<p class=soft>{counted(len(vendors), 'case')} by vendor: {escape(counts)}.</p>"
    return f'<div class="cards">{boxes}</div>{_table(lines)}{text}'


def _comparison(results):
    """The rows of comparison.csv as text."""
    lines = [["patients", "n", "propagated - original", "95 % interval", "Wilcoxon"]]
    for row in results.comparison:
        gain, low, high = (number(row[name], "+.3f") for name in ("mean_difference", "low", "high"))
        name = f"vendor {row['group']}" if row["group"] in VENDORS else row["group"]
        lines.append([name, str(row["n"]), gain, low and f"{low} to {high}", p_text(row["p"])])
    return lines


def _agreement(results):
    lines = [["quantity", "network", "bias", "limits of agreement", "mean abs. error", "r", "n"]]
    for row in results.agreement:
        bias, low, high = (number(row[name], "+.1f") for name in ("bias", "loa_low", "loa_high"))
        rest = [number(row["mae"], ".1f"), number(row["r"], ".2f"), str(row["n"])]
        name, limits = quantity_label(row["quantity"]), low and f"{low} to {high}"
        lines.append([name, row["model"], bias, limits, *rest])
    return _table(lines)


def _cases(results, shown):
    """The sortable table: per case, Dice, HD95 and ejection fraction of the models side by side."""
    models, names = results.models, ("Dice", *REGIONS, "HD95 mm", "EF %")
    columns = [f"{name} {model}" for name in names for model in models]
    lines = [["case", "vendor", "centre", "EF % expert", *columns]]
    fractions = {model: results.measured(model, "LV_EF_percent") for model in models}
    for k, case in enumerate(results.cases):
        found = []
        for model in models:
            own = [row for row in results.rows if (row["model"], row["case"]) == (model, case.code)]
            scores = [own, *([row for row in own if row["region"] == region] for region in REGIONS)]
            scores = [number(mean(row["dice"] for row in rows)) for rows in scores]
            hd95, fraction = mean(row["hd95_mm"] for row in own), fractions[model][0][k]
            found.append([*scores, number(hd95, ".1f"), number(fraction, ".1f")])
        code = (case.code, shown.index(case.code)) if case.code in shown else case.code
        start = [code, case.vendor, case.centre, number(fractions[models[0]][1][k], ".1f")]
        lines.append(start + [cell for pair in zip(*found) for cell in pair])
    missed = [" ".join(row[name] for name in FAILURE_COLUMNS) for row in results.failures]
    text = f"<p class=soft>Failures (region in only one mask): {escape(', '.join(missed))}.</p>"
    return _table(lines, sortable=True) + (text if missed else "")


def training_files(out):
    """{description: path} of the existing files that show the training of the run in `out`."""
    files = {"quality of the registration": out / "registration" / "quality.csv",
             "registration of middle slices": out / "registration" / "example.png"}
    runs = ("registration", *(f"segmentation/{model}" for model in MODELS))
    files |= {f"curves of {run.rpartition('/')[2]}": out / run / "curves.png" for run in runs}
    return {what: path for what, path in files.items() if path.exists()}


def _training(out):
    text = ""
    for what, path in training_files(out).items():
        if path.suffix == ".csv":
            text += _table(quality_lines(path))
        else:
            kind = "photo" if path.name == "example.png" else "chart"
            text += f"<p class=soft>{what}</p>{_picture(path, what, kind)}"
    return text


def _picture(path, text, kind="chart"):
    """A PNG file as an HTML image; a "chart" is inverted on a dark page."""
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img class="{kind}" src="data:image/png;base64,{data}" alt="{text}">'
    return f'<div class="scroll" tabindex="0">{image}</div>'


# ------------------------------------------------------------------------------- slices and contours


def _viewer(name, views):
    data = json.dumps(views, separators=(",", ":")).replace("<", "\\u003c")  # no </script> in it
    script = f'<script type="application/json" id="{name}-data">{data}</script>'
    return f'{script}<div class="viewer" id="{name}" data-views="{name}-data"></div>'


def _case_view(folder, results, case, why, all_frames):
    """The view of a scored case: expert and predictions, at ED and ES or in every frame."""
    image, experts, _ = load_case(case)
    low, high = intensity_window(image)
    phases = {case.ed: "ED", case.es: "ES"}
    frames = list(range(case.frames)) if all_frames else list(phases)
    sources = {"expert": experts}
    for model in results.models:
        prediction = read_prediction(folder, model, case.code)
        sources[model] = {frame: prediction[..., frame] for frame in frames}
    images, names, notes = {}, {}, {}
    for frame in frames:
        images[frame] = np.clip((image[..., frame] - low) / (high - low), 0, 1)
        names[frame] = f"{frame} ({phases[frame]})" if frame in phases else str(frame)
        own = [row for row in results.rows if (row["case"], row["phase"]) == (case.code, phases.get(frame))]
        scores = [f"{row['model']} {row['region']} {number(row['dice'])}" for row in own]
        notes[frame] = f"Dice: {'; '.join(scores)}" if own else "no expert labels in this frame"
    why = [*why, *(f"{model} {number(results.case_dice(model)[case.code])}" for model in results.models)]
    title = f"{case.code} (vendor {case.vendor}): {', '.join(why)}"
    view = _view(case.spacing, images, sources, names, notes)
    return view | {"title": title, "start": frames.index(case.ed)}


def _propagation(results, folder):
    """The cine of the case of median confidence, from ED on, and its confidence over time."""
    if not (folder / "labels.h5").exists():
        return ""
    propagated, cache = Propagated.read(folder / "labels.h5"), results.cache
    if not propagated.where:
        return ""
    cases = {case.code: case for case in cache.split("Training") if case.labelled}
    known = cases.keys() >= {code for code, _, _ in propagated.where}
    trained_on = results.trained.get("propagated", {}).get("labels")  # None: no such network is scored
    others = trained_on and trained_on != propagated.digest()
    if others or not known or propagated.labels.shape[-1] != cache.size:
        return f"<p>{NOT_SHOWN}</p>"
    case = median_case(list(cases.values()), propagated)
    confidence, images, labels, names, notes = {}, {}, {}, {}, {}
    for (code, frame, _), value in zip(propagated.where, propagated.confidence):
        if code == case.code:
            confidence.setdefault(frame, []).append(float(value))
    for frame, (slices, drawn) in labelled_cine(cache, case, propagated).items():
        images[frame], labels[frame] = np.moveaxis(slices, 0, -1), np.moveaxis(drawn, 0, -1)
        names[frame], notes[frame] = f"{frame} ({'ED' if frame == case.ed else 'ES'}, expert)", ""
        if values := confidence.get(frame):
            names[frame] = f"{frame} (propagated)"
            low, high = min(values), max(values)
            notes[frame] = f"confidence {mean(values):.3f}; {low:.3f} to {high:.3f} over slices"
    view = _view((cache.spacing,) * 2, images, {"labels": labels}, names, notes)
    view |= {"title": f"{case.code} (vendor {case.vendor})", "start": 0}
    view["curve"] = [mean(confidence[frame]) if frame in confidence else None for frame in images]
    order = list(images)  # without ES if its label is withheld and none was carried there
    view["phases"] = {name: order.index(frame) for name, frame in case.phases.items() if frame in images}
    what = "the Dice with the truth expected from the trust of its pixels"
    if propagated.trust is None:
        what = "the Dice of the label with itself after the round trip"
    slices, patients = len(propagated.where), len({code for code, _, _ in propagated.where})
    text = f"{slices} slices of {patients} patients were labelled by carrying expert labels. Confidence, "
    text += f"{np.mean(propagated.confidence):.3f} on average, is {what}. The median patient is shown."
    return f"<p>{escape(text)}</p>{_viewer('propagation', [view])}"


def _view(spacing, images, sources, names, notes):
    """Images {frame: (X, Y, Z)} in [0, 1], labels {source: {frame: (X, Y, Z)}}, cropped, for the viewer."""
    box = heart_box(np.stack([labels for own in sources.values() for labels in own.values()], -1), spacing)
    frames = []
    for frame, image in images.items():
        contours = {
            source: [[_outline(plane == label) for label in LABELS.values()] for plane in own[frame][box].T]
            for source, own in sources.items()
            if frame in own
        }
        picture = {"name": names[frame], "note": notes[frame], "image": _strip(image[box])}
        frames.append(picture | {"contours": contours})
    size = dict(zip(("width", "height", "slices"), image[box].shape))
    return {**size, "x_mm": spacing[0], "y_mm": spacing[1], "sources": list(sources), "frames": frames}


def _strip(image):
    """The slices of an image (X, Y, Z) in [0, 1], stacked vertically in one JPEG, as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(np.uint8(np.round(255 * np.concatenate(image.T)))).save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _outline(mask):
    """The outline of a mask (Y, X) as an SVG path, in half pixels, through the middles of pixel edges."""
    path = ""
    for line in contour_generator(z=np.pad(mask, 1).astype(float)).lines(0.5):
        points = np.rint(2 * line - 1).astype(int)  # the centre of pixel 0, padded to 1, lies at 1
        steps = np.diff(points, axis=0)
        turns = np.flatnonzero((steps[1:] != steps[:-1]).any(1)) + 1
        corners = np.diff(points[[0, *turns]], axis=0)
        path += "M{} {}l".format(*points[0]) + " ".join(f"{dx} {dy}" for dx, dy in corners) + "z"
    return path
