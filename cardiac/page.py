"""evaluation/report.html: one self-contained file to look at, made from the template beside this module.

Whatever comes from outside (codes, centres, names of folders) is escaped here; the page's script makes text
of it and never HTML, and the page's own policy forbids it to load anything.
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
from cardiac.evaluation import mean, number, p_text
from cardiac.files import write_text
from cardiac.propagation import Propagated
from cardiac.report import COLOURS, heart_box, labelled_cine, median_case, read_prediction


def write_report(folder, results, view, all_frames, propagation):
    """Write report.html of the evaluation in `folder`.

    view: codes to show beside the best, median and worst. all_frames: whether every frame was predicted.
    propagation: folder of propagated labels of this dataset, or None.
    """
    title = f"{' and '.join(results.models)} on {results.split} of {results.cache.name}"
    chosen = {}
    for model in results.models:
        for rank, code in results.ranked(model).items():
            chosen.setdefault(code, []).append(f"{rank} of {model}")
    for code in view:
        chosen.setdefault(code, [])
    known = {case.code: case for case in results.cases}
    shown = {code: _case_view(folder, results, known[code], why, all_frames) for code, why in chosen.items()}
    sections = [
        f"<h1>{escape(title)}</h1>",
        _summary(results),
        f"<h2>Table 1</h2>{_table(results.cells(results.table))}<p class=soft>{escape(results.caption())}</p>",
        _largest(results),
        _comparison(results),
        f'<h2>Dice by region and vendor</h2>{_picture(folder / "dice.png", "Dice by region and vendor")}',
        f"<h2>Volumes and function against the expert</h2>{_agreement(results)}",
        _picture(folder / "bland_altman.png", "Bland-Altman plots of EDV, ESV and EF of the left ventricle"),
        "<h2>Cases to look at</h2>" + _viewer("cases", list(shown.values())),
        _propagation(results.cache, propagation),
        _cases(results, list(shown)),
    ]
    template = Path(__file__).with_name("report.html").read_text()
    parts = {"title": escape(title), "body": "\n".join(sections), "colours": json.dumps(COLOURS)}
    write_text(folder / "report.html", re.sub("<!--(\\w+)-->", lambda found: parts[found[1]], template))


# ---------------------------------------------------------------------------------- numbers as HTML


def _table(lines, sortable=False):
    """Rows of text, names first, as a table; cells that are a pair are (text, view to open)."""
    head, *rows = lines
    names = [f'<button type="button">{escape(name)}</button>' if sortable else escape(name) for name in head]
    body = ["<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return (f'<div class="scroll" tabindex="0"><table><thead><tr><th scope="col">{"</th><th scope=col>".join(names)}'
            f"</th></tr></thead><tbody>{''.join(body)}</tbody></table></div>")  # fmt: skip


def _cell(cell):
    if isinstance(cell, tuple):
        return f'<button type="button" class="open" data-view="{cell[1]}">{escape(cell[0])}</button>'
    return escape(cell)


def _summary(results):
    """The figures in large, and what was trained on what."""
    cards = {f"Dice, {row['model']}": number(row["total"]) for row in results.table}
    if results.comparison:
        gain = results.comparison[0]
        cards["gain in Dice of a patient"] = number(gain["mean_difference"], "+.3f")
        cards["95 % interval of the gain"] = f"{number(gain['low'], '+.3f')} to {number(gain['high'], '+.3f')}"
        cards[f"Wilcoxon, {gain['n']} patients"] = p_text(gain["p"])
    cards["failures"] = str(len(results.failures))
    labels = {"original": "expert labels of ED and ES", "propagated": "expert and propagated labels"}
    lines = [["network", "trained on", "dataset", "steps", "validation Dice", "slices"]]
    for model, run in results.trained.items():
        used = run["settings"]
        grid = f"{used['size']} x {used['size']} at {used['spacing']:g} mm"
        data = Path(used["data"]).name
        lines.append([model, labels[model], data, str(run["steps"]), number(run["best"]), grid])
    vendors = [(vendor, sum(case.vendor == vendor for case in results.cases)) for vendor in VENDORS]
    counts = ", ".join(f"{count} {vendor} ({VENDORS[vendor]})" for vendor, count in vendors if count)
    boxes = "".join(f"<div><b>{escape(value)}</b>{escape(name)}</div>" for name, value in cards.items())
    return (f'<div class="cards">{boxes}</div>{_table(lines)}'
            f"<p class=soft>{len(results.cases)} cases by vendor: {escape(counts)}.</p>")  # fmt: skip


def _largest(results):
    if not results.largest:
        return ""
    lines = results.cells(results.table_largest)
    return f"<h2>Table 1, the largest component of each region alone</h2>{_table(lines)}"


def _comparison(results):
    if not results.comparison:
        return ""
    lines = [["patients", "n", "propagated - original", "95 % interval", "Wilcoxon"]]
    for row in results.comparison:
        low, high = number(row["low"], "+.3f"), number(row["high"], "+.3f")
        name = f"vendor {row['group']}" if row["group"] in VENDORS else row["group"]
        interval = f"{low} to {high}" if low else ""
        lines.append([name, str(row["n"]), number(row["mean_difference"], "+.3f"), interval, p_text(row["p"])])
    return (f"<h2>Gain of the propagated labels</h2>{_table(lines)}<p class=soft>Paired difference of a patient's "
            "mean Dice; bootstrap over patients; p is not corrected for the number of rows.</p>")  # fmt: skip


def _agreement(results):
    lines = [["quantity", "network", "bias", "limits of agreement", "mean abs. error", "Pearson r", "n"]]
    order = list(dict.fromkeys(row["quantity"] for row in results.agreement))
    for row in sorted(results.agreement, key=lambda row: order.index(row["quantity"])):  # the models side by side
        limits = f"{number(row['loa_low'], '+.1f')} to {number(row['loa_high'], '+.1f')}"
        numbers = [number(row["bias"], "+.1f"), limits, number(row["mae"], ".1f"), number(row["r"], ".2f")]
        lines.append([row["quantity"].replace("_", " "), row["model"], *numbers, str(row["n"])])
    return _table(lines)


def _cases(results, shown):
    """The sortable table: a row a case, Dice and HD95 of every model and the ejection fraction."""
    names = ("Dice", *REGIONS, "HD95 mm", "EF %")
    models = results.models
    lines = [["case", "vendor", "centre", "EF % expert", *(f"{name} {model}" for name in names for model in models)]]
    fractions = {(row["model"], row["case"]): row for row in results.clinical if row["quantity"] == "LV_EF_percent"}
    for case in results.cases:
        code = (case.code, shown.index(case.code)) if case.code in shown else case.code
        expert = fractions[models[0], case.code]["reference"]
        columns = []
        for model in models:
            own = [row for row in results.rows if (row["model"], row["case"]) == (model, case.code)]
            column = [number(mean(row["dice"] for row in own))]
            column += [number(mean(row["dice"] for row in own if row["region"] == region)) for region in REGIONS]
            column.append(number(mean(row["hd95_mm"] for row in own), ".1f"))
            columns.append([*column, number(fractions[model, case.code]["measured"], ".1f")])
        pairs = [cell for cells in zip(*columns) for cell in cells]
        lines.append([code, case.vendor, case.centre, number(expert, ".1f"), *pairs])
    missed = [f"{row['model']}: {row['case']} {row['phase']} {row['region']}" for row in results.failures]
    failed = f"<p class=soft>Failures (region in one mask alone): {escape(', '.join(missed))}.</p>" if missed else ""
    return f"<h2>All cases</h2>{_table(lines, sortable=True)}{failed}"


def _picture(path, text):
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<div class="scroll" tabindex="0"><img class="chart" src="data:image/png;base64,{data}" alt="{text}"></div>'


# ------------------------------------------------------------------------------- slices and contours


def _viewer(name, views):
    data = json.dumps(views, separators=(",", ":")).replace("<", "\\u003c")  # no </script> in it
    return (f'<script type="application/json" id="{name}-data">{data}</script>'
            f'<div class="viewer" id="{name}" data-views="{name}-data"></div>')  # fmt: skip


def _case_view(folder, results, case, why, all_frames):
    """The view of a scored case: expert and predictions, at ED and ES or in every frame."""
    image, experts, _ = load_case(case)
    sources = {"expert": experts}
    frames = range(case.frames) if all_frames else (case.ed, case.es)
    for model in results.models:
        prediction = read_prediction(folder, model, case.code)
        sources[model] = {frame: prediction[..., frame] for frame in frames}
    phases, notes = {case.ed: "ED", case.es: "ES"}, {}
    for frame in frames:
        own = [row for row in results.rows if (row["case"], row["phase"]) == (case.code, phases.get(frame))]
        notes[frame] = "; ".join(f"{row['model']} {row['region']} {number(row['dice'])}" for row in own)
        notes[frame] = f"Dice: {notes[frame]}" if own else "no expert labels in this frame"
    scores = [f"{model} {number(results.case_dice(model)[case.code])}" for model in results.models]
    title = f"{case.code} (vendor {case.vendor}): {', '.join([*why, *scores])}"
    low, high = np.percentile(image, (1, 99))
    images = {frame: np.clip((image[..., frame] - low) / (high - low), 0, 1) for frame in frames}
    names = {frame: f"{frame} ({phases[frame]})" if frame in phases else str(frame) for frame in frames}
    return _view(title, case.spacing, images, sources, names, notes) | {"start": list(frames).index(case.ed)}


def _propagation(cache, folder):
    """The cine of the case of median confidence, from ED to ES, and its confidence over time."""
    cases = [case for case in cache.split("Training") if case.labelled]
    if folder is None or not (folder / "labels.h5").exists():
        return ""
    propagated = Propagated.read(folder / "labels.h5")
    if not propagated.where or propagated.labels.shape[-1] != cache.size:
        return ""
    case = median_case(cases, propagated)
    cine = labelled_cine(cache, case, propagated)
    names, notes, curve = {}, {}, []
    for frame in cine:
        values = [c for (code, t, _), c in zip(propagated.where, propagated.confidence) if (code, t) == (case.code, frame)]
        names[frame] = f"{frame} ({'propagated' if values else 'ED, expert' if frame == case.ed else 'ES, expert'})"
        notes[frame] = f"confidence {np.mean(values):.3f}, {min(values):.3f} to {max(values):.3f} over slices" if values else ""
        curve.append(float(np.mean(values)) if values else None)
    images = {frame: np.moveaxis(slices, 0, -1) for frame, (slices, _) in cine.items()}
    labels = {"labels": {frame: np.moveaxis(slices, 0, -1) for frame, (_, slices) in cine.items()}}
    view = _view(f"{case.code} (vendor {case.vendor})", (cache.spacing,) * 2, images, labels, names, notes)
    text = (f"{len(propagated.where)} slices of {len({code for code, _, _ in propagated.where})} patients were labelled "
            f"by carrying ED's labels along; mean confidence {np.mean(propagated.confidence):.3f}. Shown is the "
            "patient of median confidence: the Dice of ED's label with itself after ED to t and back.")  # fmt: skip
    return f"<h2>Propagated labels</h2><p>{escape(text)}</p>{_viewer('propagation', [view | {'start': 0, 'curve': curve}])}"


def _view(title, spacing, images, sources, names, notes):
    """What the page's viewer shows: images {frame: (X, Y, Z) in [0, 1]} and labels {source: {frame: (X, Y, Z)}},
    cropped to the heart.
    """
    box = heart_box(np.stack([labels for frames in sources.values() for labels in frames.values()], -1), spacing)
    first = next(iter(images.values()))[box]
    frames = []
    for frame, image in images.items():
        contours = {
            source: [[_outline(labels[frame][..., z][box] == label) for label in LABELS.values()]
                     for z in range(first.shape[2])]
            for source, labels in sources.items() if frame in labels
        }  # fmt: skip
        picture = {"name": names[frame], "note": notes[frame], "image": _strip(image[box])}
        frames.append(picture | {"contours": contours})
    size = {"width": first.shape[0], "height": first.shape[1], "slices": first.shape[2]}
    pixel = {"x_mm": spacing[0], "y_mm": spacing[1]}
    return {"title": title, **size, **pixel, "sources": list(sources), "frames": frames}


def _strip(image):
    """The slices of an image (X, Y, Z) in [0, 1], one below the other, as a data URI: a JPEG a frame."""
    rows = np.concatenate([plane.T for plane in np.moveaxis(image, -1, 0)])
    buffer = io.BytesIO()
    Image.fromarray(np.uint8(np.round(255 * rows))).save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _outline(mask):
    """The outline of a mask (X, Y) as the path of an SVG, in half pixels, through the middles of pixel edges."""
    path = ""
    for line in contour_generator(z=np.pad(mask, 1).T.astype(float)).lines(0.5):
        points = np.rint(2 * line - 1).astype(int)  # the centre of pixel 0, padded to 1, lies at 1
        steps = np.diff(points, axis=0)
        turns = np.flatnonzero((steps[1:] != steps[:-1]).any(1)) + 1
        x, y = points[0]
        corners = np.diff(points[[0, *turns]], axis=0)
        path += f"M{x} {y}l{' '.join(f'{dx} {dy}' for dx, dy in corners)}z"
    return path
