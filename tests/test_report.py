"""The figures' helpers, and report.html in a headless browser."""

import base64
import itertools
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

import evaluate
from cardiac import page
from cardiac.cache import open_cache
from cardiac.files import read_csv
from cardiac.propagation import Propagated
from cardiac.report import COLOURS, draw_cine, heart_box
from cardiac.settings import PropagationSettings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = """--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking
--disable-component-update --disable-sync --hide-scrollbars
--enable-logging=stderr --virtual-time-budget=4000"""

# Runs in a copy of the page: drives every control, writes what it saw into the document's title.
DRIVER = """
const seen = [], check = (name, ok) => seen.push(name + "=" + (ok ? "ok" : "FAILED"));
const all = (where, what) => [...where.querySelectorAll(what)];
const root = document.getElementById("cases"), slider = root.querySelector(".frame");
const image = () => root.querySelector("image").getAttribute("href");
function move(slider, value) { slider.value = value; slider.dispatchEvent(new Event("input")); }
check("tiles", all(root, ".tiles svg").length === SLICES);
check("contours", ["path.s0", "path.s1", "path.s2"].every(kind => all(root, kind).length > 0));
const before = image(), name = root.querySelector("output").textContent;
move(slider, 1 - slider.value);
check("slider", image() !== before && root.querySelector("output").textContent !== name);
const box = root.querySelector("input[type=checkbox][value=expert]");
box.click();
check("off", all(root, "path.s0").length === 0 && all(root, "path.s1").length > 0);
box.click();
check("on", all(root, "path.s0").length > 0);
const table = all(document, "table").at(-1), head = all(table, "th");
const cells = k => all(table, "tbody tr").map(row => row.children[k].textContent);
const column = head.findIndex(th => th.textContent.startsWith("HD95"));
for (const [k, sign] of [[column, 1], [column, -1], [0, 1], [0, -1]]) {
  head[k].querySelector("button").click();
  const values = cells(k).filter(text => text), kind = sign > 0 ? "ascending" : "descending";
  const sorted = [...values].sort((a, b) => sign * (k ? a - b : a.localeCompare(b)));
  check("sort " + k + kind, "" + sorted === "" + values && head[k].getAttribute("aria-sort") === kind);
}
const open = all(document, ".open").at(-1);
open.click();
check("open", root.querySelector("select").selectedOptions[0].textContent.startsWith(open.textContent));
const cine = document.getElementById("propagation"), time = cine.querySelector(".frame");
const dot = () => cine.querySelector(".curve circle").getAttribute("cx");
move(time, 1);
const first = dot();
check("confidence", cine.querySelector(".note").textContent.includes("confidence") && +first > 0);
const reached = node => { node.focus(); return node.tabIndex === 0 && document.activeElement === node; };
const texts = all(cine, ".curve text"), mark = phase => texts.find(text => text.textContent === phase);
const frames = JSON.parse(document.getElementById("propagation-data").textContent)[0].frames;
const place = phase => 300 * frames.findIndex(each => each.name.includes(phase)) / (frames.length - 1) - 7;
check("phases", ["ED", "ES"].every(phase => Math.abs(mark(phase).getAttribute("x") - place(phase)) < 1e-6));
check("keyboard", all(document, "button, input, select").every(reached));
check("names", all(document, "input, select").every(node => node.labels.length === 1));
check("inside", !document.querySelector("img[src^=http], script[src], link"));
check("width", document.documentElement.scrollWidth <= innerWidth);
const play = cine.querySelector(".play");
play.click();
setTimeout(() => {
  check("play", time.value !== "1");
  document.title = "SEEN " + seen.join(" ");
}, 1000);
"""


@pytest.fixture(scope="module")
def evaluation(trained_run, tmp_path_factory):
    """The folder evaluation/ of a tiny run."""
    data, trained = trained_run
    out = tmp_path_factory.mktemp("report") / "run"
    shutil.copytree(trained, out)
    words = ["--data", data, "--out", out, "--workers", 1, "--split", "Validation", "--view", "D2C2C2"]
    assert evaluate.main([str(word) for word in words]) == 0
    return out / "evaluation"


def test_report_is_one_small_file_that_loads_nothing(evaluation):
    text = (evaluation / "report.html").read_text()
    assert len(text) < 2_000_000
    assert not re.findall(r"(?:src|href)=[\"']?(?!data:|\")[^\"'> ]", text)
    assert "default-src 'none'" in text
    assert "<!--" not in text


def test_report_shows_how_the_networks_were_trained(evaluation):
    text = (evaluation / "report.html").read_text()
    training = text[text.index("<h2>Training</h2>") : text.index("<h2>All cases</h2>")]
    pictures = re.findall(r'<img class="(\w+)" src="data:image/png;base64,([^"]*)" alt="([^"]*)"', training)
    files = {"registration of middle slices": "registration/example.png"}
    files |= {f"curves of {name}": f"segmentation/{name}/curves.png" for name in ("original", "propagated")}
    files["curves of registration"] = "registration/curves.png"
    assert {alt: base64.b64decode(data) for _, data, alt in pictures} == {
        what: (evaluation.parent / path).read_bytes() for what, path in files.items()
    }
    assert {alt for kind, _, alt in pictures if kind == "photo"} == {"registration of middle slices"}
    rows = read_csv(evaluation.parent / "registration" / "quality.csv")
    own = [float(row["dice_after"]) for row in rows if row["split"] == "Testing" and row["region"] == "LV"]
    lines = re.findall(r"<tr><td>Testing LV</td><td>(\d+)</td><td>[^<]*</td><td>([^<]*)</td>", training)
    assert lines == [(str(len(own)), f"{np.mean(own):.3f}")]


def test_the_table_of_all_cases_has_each_ones_own_scores():
    cases = [SimpleNamespace(code=code, vendor="A", centre="1") for code in ("A1", "B2")]
    models, regions = ("original", "propagated"), ("LV", "MYO", "RV")
    places = itertools.product(models, ("A1", "B2"), ("ED", "ES"), regions)
    rows = [dict(zip(("model", "case", "phase", "region"), place)) for place in places]
    for k, row in enumerate(rows):
        row |= {"dice": k / 100, "hd95_mm": float(k)}
    fractions = np.array([50.0, 60.0]), np.array([55.0, 65.0])
    numbers = {"rows": rows, "failures": [], "measured": lambda *_: fractions}
    results = SimpleNamespace(models=models, cases=cases, **numbers)
    table = page._cases(results, ["B2"])
    cells = re.findall("<td>(?:<button[^>]*>)?([^<]*)(?:</button>)?</td>", table)
    # Dice of both models in all, of LV, MYO and RV; HD95; ejection fraction
    first = ["0.025", "0.145", "0.015", "0.135", "0.025", "0.145", "0.035", "0.155", "2.5", "14.5"]
    second = ["0.085", "0.205", "0.075", "0.195", "0.085", "0.205", "0.095", "0.215", "8.5", "20.5"]
    one, other = ["A1", "A", "1", "55.0", *first, "50.0", "50.0"], ["B2", "A", "1", "65.0", *second]
    assert cells == [*one, *other, "60.0", "60.0"]
    assert re.findall(r'data-view="(\d+)">([^<]*)<', table) == [("0", "B2")]


def test_report_shows_each_case_with_its_own_scores(evaluation):
    text = (evaluation / "report.html").read_text()
    rows = [row for row in read_csv(evaluation / "cases.csv") if row["dice"]]

    def dice(**place):
        own = [float(row["dice"]) for row in rows if place.items() <= row.items()]
        return f"{np.mean(own):.3f}" if own else ""

    views = json.loads(re.search(r'id="cases-data">(.*?)</script>', text)[1])
    for view in views:
        for frame in view["frames"]:
            phase = re.search(r"\((ED|ES)\)", frame["name"])[1]
            found = re.findall(r"(original|propagated) (LV|MYO|RV) ([0-9.]*)", frame["note"])
            assert len(found) == 6
            code = view["title"].split()[0]
            for model, region, value in found:
                assert value == dice(case=code, model=model, region=region, phase=phase)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
@pytest.mark.parametrize("width", [390, 1200])
def test_report_works_in_a_browser(evaluation, tmp_path, width):
    text = (evaluation / "report.html").read_text()
    driver = f"<script>{DRIVER.replace('SLICES', '3')}</script></body>"
    (tmp_path / "driven.html").write_text(text.replace("</body>", driver))
    # Chromium's own window has a minimum width; a frame inside has none.
    frame = f'<iframe src="driven.html" style="width: {width}px; height: 3000px"></iframe>'
    relay = "<script>setInterval(() => document.title = frames[0].document.title, 50)</script>"
    (tmp_path / "frame.html").write_text(f"<!doctype html><html><body>{frame}{relay}</body></html>")
    flags = [*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", "--allow-file-access-from-files"]
    command = [CHROMIUM, *flags, "--dump-dom", (tmp_path / "frame.html").as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in found.stderr
    seen = re.search("<title>SEEN (.*?)</title>", found.stdout)
    assert seen, found.stderr[-2000:]
    assert "FAILED" not in seen[1], seen[1]
    assert "play=ok" in seen[1]


def test_the_curve_marks_only_phases_that_have_a_label(tiny_data, tmp_path):
    words = {"size": 32, "spacing": 2.0, "workers": 1, "labelled_phases": "ED"}
    cache = open_cache(PropagationSettings(data=tiny_data, cache=tmp_path, **words))
    case = next(case for case in cache.split("Training") if case.labelled)
    frame = next(frame for frame in range(case.frames) if frame not in (case.ed, case.es))
    labels = np.zeros((1, 32, 32), np.uint8)
    labels[0, 10:20, 10:20] = 1
    Propagated(labels, [(case.code, frame, 1)], np.ones(1)).write(tmp_path / "labels.h5", "")
    text = page._propagation(SimpleNamespace(trained={}, cache=cache), tmp_path)
    (view,) = json.loads(re.search('id="propagation-data">(.*?)</script>', text)[1])
    assert [each["name"] for each in view["frames"]] == [f"{case.ed} (ED, expert)", f"{frame} (propagated)"]
    assert view["phases"] == {"ED": 0}


def test_embedded_data_cannot_end_its_script():
    text = page._viewer("cases", [{"title": "</script><script>alert(1)</script>"}])
    assert text.count("</script>") == 1
    assert page._table([["a"], ["<img src=x onerror=alert(1)>"]]).count("<img") == 0


def test_outline_of_one_pixel_and_of_two_parts():
    mask = np.zeros((4, 5), bool)
    mask[1, 2] = True  # its centre is at (x, y) = (2.5, 1.5): (5, 3) in half pixels
    (path,) = re.findall(r"M(-?\d+) (-?\d+)l([-\d ]+)z", page._outline(mask))
    points = np.cumsum([[int(path[0]), int(path[1])], *np.array(path[2].split(), int).reshape(-1, 2)], axis=0)
    assert {tuple(point) for point in points} == {(4, 3), (5, 2), (6, 3), (5, 4)}
    mask[3, 0] = True
    assert page._outline(mask).count("M") == 2
    assert page._outline(np.zeros((4, 5), bool)) == ""


def test_a_cine_keeps_the_colours_of_the_regions(tiny_data, tmp_path):
    words = {"size": 32, "spacing": 2.0, "workers": 1}
    cache = open_cache(PropagationSettings(data=tiny_data, cache=tmp_path, **words))
    cases = [case for case in cache.split("Training") if case.labelled]
    nothing = Propagated(np.zeros((0, 32, 32), np.uint8), [], np.zeros(0))
    draw_cine(tmp_path / "cine.gif", cache, cases, nothing)
    with Image.open(tmp_path / "cine.gif") as gif:
        assert (gif.n_frames, gif.info["duration"]) == (2, 700), "only ED and ES, slowly, not to flicker"
        pixels = np.asarray(gif.convert("RGB")).reshape(-1, 3).astype(int)
    for region, colour in COLOURS.items():
        difference = np.abs(pixels - 255 * np.array(to_rgb(colour))).max(1)
        assert (difference <= 2).sum() > 10, region


def test_heart_box_has_its_margin_and_stays_inside():
    labels = np.zeros((40, 30, 3), np.uint8)
    labels[10:15, 2:4] = 1
    assert heart_box(labels, (2.0, 1.0), margin=6) == (slice(7, 18), slice(0, 10))
    assert heart_box(np.zeros_like(labels), (1, 1))[0].stop >= 40
