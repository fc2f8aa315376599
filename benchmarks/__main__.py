"""Rewrites the tables and the picture of docs/benchmarks.md: `python -m benchmarks [SECTION ...]`.

Sections: registration, segmentation, data, propagation, metrics, host, scale; all if none is named. The
hand-written end of the page is kept. Needs `pip install -e '.[bench]'` and `pip install --no-deps
voxelmorph==0.2`.
"""

import argparse
import datetime
import json
import platform
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import matplotlib
import monai
import torch

from benchmarks.common import ROOT, Row
from cardiac.run import describe

SECTIONS = ("registration", "segmentation", "data", "propagation", "metrics", "host", "scale")
PAGE, RESULTS, PICTURE = (ROOT / "docs" / f"benchmarks.{kind}" for kind in ("md", "json", "png"))
BY_HAND = "<!-- from here on written by hand -->"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--rounds", type=int, default=7, help="rounds in which every contestant is timed")
    arguments = parser.parse_args()
    if unknown := set(arguments.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}")
    names = arguments.sections or SECTIONS
    if len(names) > 1:  # a process each: memory left allocated by one would affect the next
        for name in names:
            rounds = ["--rounds", str(arguments.rounds)]
            subprocess.run([sys.executable, "-m", "benchmarks", name, *rounds], cwd=ROOT, check=True)
        return
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    (name,), tables = names, []
    stored = {table["title"]: table for table in results.get(name, [])}
    for title, text, rows in import_module(f"benchmarks.{name}").sections(arguments.rounds):
        if rows is None:  # not for this processor: as measured on another
            if title in stored:
                tables.append(stored[title])
            continue
        if isinstance(rows[0], Row):
            rows = [vars(row) for row in rows]
        tables.append({"title": title, "text": text, "rows": rows, "machine": machine()})
        print(f"\n{title}", *(" | ".join(row) for row in cells(rows)), sep="\n", flush=True)
    results[name] = tables
    results = {name: results[name] for name in SECTIONS if name in results}
    RESULTS.write_text(json.dumps(results, indent=1))
    tables = [table for section in results.values() for table in section]
    write_page(tables)
    draw(tables)


def machine():
    """Date, hardware and software of a measurement."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    processor = f"{len(names)} x {names[0]}" if names else platform.machine()
    processor += f" ({torch.backends.cpu.get_cpu_capability()})"
    clock = "wall time throughout, " if device.type == "cuda" else ""
    return (
        f"{datetime.date.today()}, {processor}, {describe(device)}, {clock}"
        f"torch {torch.__version__.split('+')[0]}, MONAI {monai.__version__}, "
        f"Python {platform.python_version()}"
    )


def cells(rows):
    """The cells of a table, header first: of stored `Row`s, or the rows themselves if they are cells."""
    if isinstance(rows[0], list):
        return rows
    return [("what", "measured", "target", "met"), *(Row(**row).cells() for row in rows)]


def write_page(tables):
    """Write the page: the tables, then the hand-written part, which is kept."""
    by_hand = PAGE.read_text().split(BY_HAND)[1] if PAGE.exists() else "\n"
    lines = [
        "# Benchmarks",
        "",
        "    pip install -e '.[bench]' && pip install --no-deps voxelmorph==0.2 && python -m benchmarks",
        "",
        "rewrites the tables and the picture. Every ratio is measured in one process, on one thread, the "
        "contestants in turn on the same input: the median of the rounds (smallest to largest). Times on a "
        "CPU are CPU time unless marked 'wall time', because the machine is shared. A ratio below 1 means "
        "that ours is faster or smaller, except where the target is 'at least'.",
        "",
        "![measured ratios and their targets](benchmarks.png)",
        "",
    ]
    if not any(", cuda (" in table["machine"] for table in tables):
        lines += ["No GPU was available: all figures are of a CPU and say nothing about GPUs.", ""]
    for table, following in zip(tables, [*tables[1:], {"machine": None}]):
        header, *rows = ("| " + " | ".join(row) + " |" for row in cells(table["rows"]))
        rule = "|---" + "|---:" * (header.count("|") - 2) + "|"
        lines += [f"## {table['title']}", "", table["text"], "", header, rule, *rows, ""]
        if following["machine"] != table["machine"]:
            lines += [f"Measured: {table['machine']}.", ""]
    PAGE.write_text("\n".join([*lines, BY_HAND]) + by_hand)


def draw(tables):
    """Plot what has a target, relative to it, on a logarithmic axis: left of 1 the target is met."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    bars, context = [], ""
    for table in tables:
        for row in (Row(**row) for row in table["rows"] if isinstance(row, dict)):
            context = row.what if not row.what.startswith("...") else context
            if row.met is None:
                continue
            shares = [v / row.at_most if row.at_most else row.at_least / v for v in sorted(row.values)]
            share = row.median / row.at_most if row.at_most else row.at_least / row.median
            label = row.what.replace("...", context.rsplit(": ", 1)[0] + ":")
            bars.append((label, max(share, 1e-2), min(shares), max(shares), row.met))
    figure, axes = plt.subplots(figsize=(10, 0.26 * len(bars) + 1), layout="constrained")
    for place, (_, share, low, high, met) in enumerate(bars):
        axes.plot([max(low, 1e-2), max(high, 1e-2)], [place] * 2, color="0.6", lw=4, solid_capstyle="butt")
        axes.plot(share, place, "o" if met else "s", color="tab:green" if met else "tab:red", ms=6)
    axes.axvline(1, color="k", lw=1)
    axes.set(xscale="log", xlabel="measured value relative to the target's limit: left of the line it is met",
             yticks=range(len(bars)), yticklabels=[bar[0] for bar in bars])
    axes.tick_params(axis="y", labelsize=7)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.grid(axis="x", which="both", alpha=0.3)
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
