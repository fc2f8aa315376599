"""Check a dataset without doing anything else: `python -m cardiac.check --data DIR`.

Reads every case with its voxels, reports every problem (one line each, on stderr) and prints a summary.
The exit status is 0 if there are no problems, otherwise 2.
"""

import collections
import sys

from tqdm import tqdm

from cardiac import LABELS
from cardiac.cases import VENDORS, load_case
from cardiac.files import InputError, Parser, printable
from cardiac.layouts import read_cases
from cardiac.metrics import volume_ml


def main(argv=None):
    parser = Parser("python -m cardiac.check", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--data", required=True, help="folder of a dataset, M&Ms or ACDC")
    try:
        dataset = read_cases(parser.parse_args(argv).data)
    except InputError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    problems, warnings, good, volumes = list(dataset.problems), list(dataset.warnings), [], []
    for case in tqdm(dataset.cases, "reading", unit="case", disable=None):
        try:
            _, labels, case_warnings = load_case(case)
        except InputError as fault:
            problems.append(str(fault))
            continue
        warnings += case_warnings
        good.append(case)
        phases = case.phases.items() if labels else ()
        named = {(phase, region): labels[t] == k for phase, t in phases for region, k in LABELS.items()}
        volumes.append({key: volume_ml(mask, case.spacing) for key, mask in named.items()})
    for line in summary(dataset, good, volumes):
        print(line)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    print(f"{len(good)} good cases, {len(problems)} problems, {len(warnings)} warnings")
    return 2 if problems else 0


def summary(dataset, cases, volumes):
    """Lines that describe the dataset: cases by split and vendor, grids, frames, labels."""
    yield f"{dataset.kind} dataset in {printable(dataset.root)}"
    if not cases:
        return
    yield "cases".ljust(24) + "".join(f"{vendor} {maker}".rjust(11) for vendor, maker in VENDORS.items())
    names = [case.split if case.labels else f"{case.split} (unlabelled)" for case in cases]
    groups = collections.Counter(zip(names, (case.vendor for case in cases)))
    for name in dict.fromkeys(names):
        yield f"  {name}".ljust(24) + "".join(str(groups[name, vendor]).rjust(11) for vendor in VENDORS)
    x, y, z, frames = zip(*(case.shape for case in cases))
    in_plane = [mm for case in cases for mm in case.spacing[:2]]
    yield f"grid       {_range(x)} x {_range(y)} pixels, {_range(z)} slices, {_range(frames)} frames"
    between = _range(case.spacing[2] for case in cases)
    yield f"spacing    {_range(in_plane)} mm in plane, {between} mm between slices"
    labelled = [case for case in cases if case.labels]
    if not labelled:
        yield "labels     none"
        return
    wraps = sum(case.es < case.ed for case in labelled)
    unlabelled = [(case.es - case.ed - 1) % case.shape[3] for case in labelled]
    text = f"labels     {len(labelled)} cases; {_range(unlabelled)} frames between ED and ES"
    yield f"{text}; ED comes after ES in {wraps}"
    if not any(unlabelled):
        yield "           nothing to propagate to, unless --labelled-phases treats ED or ES as unknown"
    for phase in ("ED", "ES"):
        ml = {region: _range(v[phase, region] for v in volumes if v) for region in LABELS}
        yield f"volume     {phase}: " + ", ".join(f"{region} {values} ml" for region, values in ml.items())


def _range(numbers):
    numbers = sorted(numbers)
    low, high = f"{numbers[0]:.4g}", f"{numbers[-1]:.4g}"
    return low if low == high else f"{low} to {high}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # not left to `run.script`, which imports torch
        sys.exit(130)
