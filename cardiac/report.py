"""Figures and tables to look at: curves, examples, Bland-Altman plots, the beating cine."""

import io

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from PIL import Image

from cardiac import LABELS, REGIONS
from cardiac.cases import load_case
from cardiac.evaluation import mean, number, prediction_path, quantity_label
from cardiac.files import read_csv, replacing, write_bytes
from cardiac.losses import IGNORED
from cardiac.networks import register, segment
from cardiac.nifti import read_label_values
from cardiac.slices import SliceStore
from cardiac.warp import jacobian_determinant, warp

# Okabe & Ito (2008): distinct for colour-blind readers, on dark images too
COLOURS = {"LV": "#E69F00", "MYO": "#56B4E9", "RV": "#CC79A7"}
MODEL_COLOURS = {"original": "#767676", "propagated": "#0072B2"}


def save_figure(figure, path):
    """Write a figure as PNG, atomically and without matplotlib's version in it."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    write_bytes(path, buffer.getvalue())


def show_slice(axes, image, labels=None, title=None, **options):
    """Draw a slice (X, Y) as a viewer does, X to the right and Y down, with contours of its labels.

    Returns matplotlib's image, for a colour bar.
    """
    axes.set(xticks=[], yticks=[])  # invisible ticks would take a third of a figure's time
    drawn = axes.imshow(image.T, cmap=options.pop("cmap", "gray"), interpolation="nearest", **options)
    if labels is not None:
        draw_contours(axes, labels)
    axes.set_axis_off()
    if title:
        axes.set_title(title, fontsize=8)
    return drawn


def draw_contours(axes, labels, **options):
    """Contours of LV, MYO and RV of labels (X, Y), LV last: it shares its border with MYO."""
    for region in reversed(REGIONS):
        mask = (labels == LABELS[region]).T
        if mask.any() and not mask.all():
            lines = axes.contour(mask, [0.5], colors=COLOURS[region], **{"linewidths": 1, **options})
            # visible on bright blood, too
            lines.set_path_effects([withStroke(linewidth=2.2, foreground="black", alpha=0.35)])


def draw_legend(figure, others=None, **options):
    """A legend of the regions' colours below a figure, and of `others`, {label: style of a line}."""
    lines = {region: {"color": colour} for region, colour in COLOURS.items()} | (others or {})
    handles = [Line2D([], [], label=label, **style) for label, style in lines.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8, **options)


def draw_curves(folder):
    """curves.png from log.csv: losses on the left, validation scores on the right."""
    rows = read_csv(folder / "log.csv")
    steps = [int(row["step"]) for row in rows]
    figure = Figure((9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    others = {"epoch", "step", "lr", "score", "seconds", "samples_per_second", "waiting_percent", "memory_gb"}
    for name in (name for name in rows[0] if name not in others):
        values = [float(row[name] or "nan") for row in rows]
        axes = right if "dice" in name else left
        axes.plot(steps, values, ".-", label=name.replace("_", " "), linewidth=1, markersize=3)
    left.set(xlabel="step", ylabel="loss, and its unweighted terms", yscale="log")
    right.set(xlabel="step", ylabel="validation Dice")
    low, high = right.get_ylim()
    right.set_ylim(min(low, high - 0.05), high)  # a change by .001 must not look like a leap
    for axes in (left, right):
        if axes.lines:  # without labels of both phases the registration has no Dice
            axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, folder / "curves.png")


def draw_registration(path, network, store, count=4):
    """example.png: middle slices of `count` cases: moving, fixed, warped, differences, grid, Jacobian."""
    cases = _spread(store.cases, count)
    figure = Figure((14, 2.15 * len(cases) + 0.7), layout="constrained")
    grid = figure.subplots(len(cases), 7, squeeze=False)
    for axes, case in zip(grid, cases):
        z = case.slices // 2
        moving, fixed = (store.frame(case, frame)[z : z + 1] for frame in (case.ed, case.es))
        known = store.expert_or_ignored(case, case.ed)[z : z + 1]
        displacement = register(network, moving, fixed, known)
        labels, target = known[0].cpu().numpy(), store.expert_or_ignored(case, case.es)[z].cpu().numpy()
        warped = warp(moving, displacement)[0, 0].cpu().numpy()
        determinant = jacobian_determinant(displacement)[0].cpu().numpy()
        moving, fixed = moving[0, 0].cpu().numpy(), fixed[0, 0].cpu().numpy()
        grey, change = {"vmin": 0, "vmax": 1}, {"cmap": "RdBu_r", "vmin": -0.5, "vmax": 0.5}
        show_slice(axes[0], moving, labels, f"{case.code}: moving (ED)", **grey)
        show_slice(axes[1], fixed, target, "fixed (ES)", **grey)
        show_slice(axes[2], warped, target, "warped, ES contours", **grey)
        show_slice(axes[3], moving - fixed, None, "moving - fixed", **change)
        difference = show_slice(axes[4], warped - fixed, None, "warped - fixed", **change)
        show_slice(axes[5], moving, None, "where warped is sampled", **grey)
        _draw_grid(axes[5], displacement[0].cpu().numpy())
        logarithm = np.log2(determinant.clip(min=1e-6))  # folds get the darkest colour
        growth = show_slice(axes[6], logarithm, None, "log2 det J", cmap="PuOr", vmin=-2, vmax=2)
    for drawn, columns, text in ((difference, grid[:, 3:5], "of the intensity window"),
                                 (growth, grid[:, 6:], "shrinks from ED to ES where > 0")):
        bar = figure.colorbar(drawn, ax=columns, location="bottom", aspect=20, pad=0.02, shrink=0.8)
        bar.set_label(text, fontsize=8)
        bar.ax.tick_params(labelsize=8)
    draw_legend(figure)
    save_figure(figure, path)


def _spread(cases, count):
    """`count` of the cases, evenly spread over the list."""
    return [cases[k] for k in np.linspace(0, len(cases) - 1, min(count, len(cases))).astype(int)]


def draw_segmentation(path, network, store, count=4):
    """example.png: middle slices of `count` cases at ED and ES, expert's and network's contours."""
    cases = _spread(store.cases, count)
    figure = Figure((2.4 * 4, 2.6 * len(cases)), layout="constrained")
    for axes, case in zip(figure.subplots(len(cases), 4, squeeze=False), cases):
        z = case.slices // 2
        for k, (phase, frame) in enumerate(case.phases.items()):
            image = store.frame(case, frame)[z : z + 1]
            labels = store.expert_or_ignored(case, frame)[z].cpu().numpy()  # no contours where IGNORED
            prediction = segment(network, image).argmax(1)[0].cpu().numpy()
            image = image[0, 0].cpu().numpy()
            show_slice(axes[2 * k], image, labels, f"{case.code} {phase}: expert", vmin=0, vmax=1)
            show_slice(axes[2 * k + 1], image, prediction, "network", vmin=0, vmax=1)
    draw_legend(figure)
    save_figure(figure, path)


def draw_dice(path, results):
    """Dice by region and vendor: boxes, and a point per case and phase, side by side for each model."""
    vendors = list(dict.fromkeys(case.vendor for case in sorted(results.cases, key=lambda case: case.vendor)))
    figure = Figure((9, 3.2), dpi=150, layout="constrained")
    for axes, region in zip(figure.subplots(1, len(REGIONS), sharey=True), REGIONS):
        for k, model in enumerate(results.models):
            style = {"color": MODEL_COLOURS[model], "linewidth": 1.2}
            boxes = dict.fromkeys(("boxprops", "medianprops", "whiskerprops", "capprops"), style)
            for x, vendor in enumerate(vendors):
                x += 0.4 * k - 0.2 * (len(results.models) - 1)
                place = {"model": model, "region": region, "vendor": vendor}.items()
                scores = [r["dice"] for r in results.rows if place <= r.items() and not np.isnan(r["dice"])]
                spread = x + np.linspace(-0.1, 0.1, len(scores))
                axes.plot(spread, scores, "o", markersize=3, alpha=0.6, markeredgewidth=0, **style)
                if len(scores) >= 5:  # fewer points need no box
                    axes.boxplot(scores, positions=[x], widths=0.34, showfliers=False, whis=(0, 100), **boxes)
        axes.set_xticks(range(len(vendors)), [results.starred(vendor) for vendor in vendors])
        axes.set(title=region, xlabel="vendor", ylim=(-0.02, 1.02))
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supylabel("Dice of a case at ED or ES", fontsize=10)
    handles = [Line2D([], [], color=MODEL_COLOURS[model], label=model) for model in results.models]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False)
    save_figure(figure, path)


def draw_bland_altman(path, results):
    """Bland-Altman plots of EDV, ESV and EF of the LV, a row per model, with bias and limits of agreement."""
    figure = Figure((10, 0.3 + 2.7 * len(results.models)), dpi=150, layout="constrained")
    grid = figure.subplots(len(results.models), 3, sharex="col", sharey="col", squeeze=False)
    for model, line in zip(results.models, grid):
        for axes, quantity in zip(line, ("LV_EDV_ml", "LV_ESV_ml", "LV_EF_percent")):
            measured, reference = results.measured(model, quantity)
            difference, place = measured - reference, {"model": model, "quantity": quantity}.items()
            style = {"color": MODEL_COLOURS[model], "alpha": 0.7, "markersize": 4}
            axes.plot((measured + reference) / 2, difference, "o", **style)
            (found,) = (row for row in results.agreement if place <= row.items())
            for name, style in (("bias", "-"), ("loa_low", "--"), ("loa_high", "--")):
                axes.axhline(found[name], color="black", linestyle=style, linewidth=0.9)
            axes.axhline(0, color="black", linewidth=0.4, alpha=0.5)
            axes.margins(0.12, 0.15)
            bias, low, high = (number(found[name], "+.1f") for name in ("bias", "loa_low", "loa_high"))
            outside = np.count_nonzero(np.abs(difference) > 110) if "EF" in quantity else 0
            title = quantity_label(quantity) + (f"; {outside} not shown" if outside else "")
            title += f"\nbias {bias}" + (f" [{low}, {high}]" if low else "")
            axes.set_title(title, fontsize=9)
            axes.set_ylabel(f"{model} - expert", fontsize=9)
            axes.set_xlabel("mean of both", fontsize=9)
            axes.spines[["top", "right"]].set_visible(False)
    # EF's axes, shared by all models; a tiny volume at ED gives any EF
    axes.set(xlim=np.clip(axes.get_xlim(), -20, 120), ylim=np.clip(axes.get_ylim(), -110, 110))
    save_figure(figure, path)


def heart_box(labels, spacing, margin=12):
    """Slices (x, y) of the box around the labels (X, Y, ...), `margin` mm wider on every side."""
    box = []
    for axis, mm in enumerate(spacing[:2]):
        filled = np.flatnonzero(labels.any(axis=tuple(k for k in range(labels.ndim) if k != axis)))
        first, last = (filled[0], filled[-1]) if len(filled) else (0, labels.shape[axis])
        box.append(slice(max(0, int(first - margin / mm)), int(last + margin / mm) + 1))
    return tuple(box)


def draw_overlays(folder, results):
    """overlays_MODEL.png: best, median and worst case of each model, expert solid and prediction dashed."""
    known = {case.code: case for case in results.cases}
    for model in results.models:
        scores, ranks = results.case_dice(model), results.ranked(model)
        figure = Figure((2.1 * 6, 2.35 * len(ranks) + 0.3), layout="constrained")
        for line, (rank, code) in zip(figure.subplots(len(ranks), 6, squeeze=False), ranks.items()):
            case, (image, experts, _) = known[code], load_case(known[code])
            prediction = read_prediction(folder, model, code)
            labels = np.stack([*experts.values(), prediction[..., case.ed], prediction[..., case.es]], -1)
            box = heart_box(labels, case.spacing)
            look = {"vmax": np.percentile(image, 99), "aspect": case.spacing[1] / case.spacing[0]}
            shown = [round(part * (case.slices - 1)) for part in (0.2, 0.5, 0.8)]
            places = [(*phase, z) for phase in case.phases.items() for z in shown]
            for axes, (phase, frame, z) in zip(line, places):
                plane, expert = image[..., z, frame][box], experts[frame][..., z][box]
                show_slice(axes, plane, expert, f"{phase}, slice {z}", **look)
                draw_contours(axes, prediction[..., z, frame][box], linestyles="dashed", linewidths=1.6)
            line[0].set_title(f"{rank}: {code}, Dice {scores[code]:.3f}\n{line[0].get_title()}", fontsize=8)
        draw_legend(figure, {"expert": {"color": "gray"}, model: {"color": "gray", "linestyle": "--"}})
        save_figure(figure, folder / f"overlays_{model}.png")


def read_prediction(folder, model, code):
    """The prediction (X, Y, Z, T) uint8 of a case below the evaluation's folder."""
    return read_label_values(prediction_path(folder / "predictions" / model, code))


def _draw_grid(axes, displacement, every=5):
    rows, columns = np.indices(displacement.shape[1:]) + displacement
    style = {"color": "#E69F00", "linewidth": 0.5}
    axes.plot(rows[::every].T, columns[::every].T, **style)
    axes.plot(rows[:, ::every], columns[:, ::every], **style)
    axes.set(xlim=(-0.5, displacement.shape[1] - 0.5), ylim=(displacement.shape[2] - 0.5, -0.5))


def draw_cine(path, cache, cases, propagated):
    """cine.gif: three slices of one case through the labelled frames, from ED on, contours beating.

    The case is the one of median confidence. Without propagated labels only the expert's frames are drawn.
    """
    case = median_case(cases, propagated)
    frames = labelled_cine(cache, case, propagated)
    shown = np.unique(np.linspace(0.25, 0.75, 3) * (case.slices - 1) + 0.5).astype(int)
    pictures, palette = [], _palette()
    for frame, (images, labels) in frames.items():
        figure = Figure((2.4 * len(shown), 3.0), dpi=100, layout="constrained", facecolor="black")
        for axes, z in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown):
            show_slice(axes, images[z], labels[z], vmin=0, vmax=1)
            axes.set_title(f"slice {z}", fontsize=8, color="white")
        expert = [f"{phase}, expert" for phase, at in case.phases.items() if at == frame in case.expert]
        kind = expert[0] if expert else "propagated"
        figure.suptitle(f"{case.code}  frame {frame}  ({kind})", fontsize=9, color="white")
        draw_legend(figure, labelcolor="white")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
        pictures.append(picture.quantize(palette=palette, dither=Image.Dither.NONE))
    first, *others = pictures
    pace = {"duration": 120 if len(pictures) > 4 else 700, "loop": 0}  # ms: slower for ED and ES only
    with replacing(path) as temporary:
        first.save(temporary, "GIF", save_all=True, append_images=others, **pace)


def _palette():
    """A GIF's 256 colours: greys, and those of the regions from black to white. An adaptive palette would
    leave none for a thin contour.
    """
    colours = [to_rgb(colour) for colour in COLOURS.values()]
    shades = [np.linspace(0, 1, 256 - 32 * len(colours))[:, None] * np.ones(3)]
    for colour in colours:
        shades += [np.linspace((0, 0, 0), colour, 16), np.linspace(colour, (1, 1, 1), 16)]
    image = Image.new("P", (1, 1))
    image.putpalette(np.uint8(255 * np.concatenate(shades)).tobytes())
    return image


def median_case(cases, propagated):
    """The case whose propagated labels have the median confidence."""
    confidence = {case.code: [] for case in cases}
    for (code, _, _), value in zip(propagated.where, propagated.confidence):
        confidence[code].append(value)
    cases = [case for case in cases if confidence[case.code]] or cases
    ranked = sorted(cases, key=lambda case: (np.mean(confidence[case.code] or [0]), case.code))
    return ranked[len(ranked) // 2]


def labelled_cine(cache, case, propagated):
    """{frame: (images (Z, S, S), labels (Z, S, S))} of all frames with labels, in order of time from ED."""
    store = SliceStore(cache, [case], torch.device("cpu"), place="file")
    (own,) = store.cases
    maps = propagated.of(case) | {frame: store.expert(own, frame).numpy() for frame in case.expert}
    order = sorted(maps, key=lambda frame: (frame - case.ed) % case.frames)
    return {t: (store.frame(own, t)[:, 0].numpy(), np.where(maps[t] == IGNORED, 0, maps[t])) for t in order}


def quality_lines(path):
    """The registration's quality.csv as rows of text, one per split and region; mean over cases."""
    rows = read_csv(path)
    lines = [["ED -> ES", "cases", "Dice before", "after", "HD95 mm before", "after", "folding %"]]
    names = [f"{score}_{when}" for score in ("dice", "hd95_mm") for when in ("before", "after")]
    forms = dict(zip((*names, "folding_percent"), (".3f", ".3f", ".1f", ".1f", ".4f")))
    for split in dict.fromkeys(row["split"] for row in rows):
        for region in (*REGIONS, "mean"):
            own = [row for row in rows if row["split"] == split and region in (row["region"], "mean")]
            cells = [number(mean(float(row[name] or "nan") for row in own), forms[name]) for name in forms]
            lines.append([f"{split} {region}", str(len({row["case"] for row in own})), *cells])
    return lines
