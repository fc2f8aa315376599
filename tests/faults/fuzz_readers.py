"""Mutate headers and tables at random: the readers must return a case or one line that names the fault.

    python tests/faults/fuzz_readers.py --rounds 2000 --seed 0

Bytes of NIfTI headers, of compressed files and of the table are flipped, set to extremes, cut, inserted.
Prints the outcomes; exit status 1 if anything else was raised (with its seed) or memory passed 1 GiB.
"""

import argparse
import collections
import gzip
import random
import resource
import shutil
import struct
import sys
import tempfile
import traceback
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from datasets import MMS_CASES, TABLE, write_acdc, write_mms  # noqa: E402

from cardiac.cases import load_case  # noqa: E402
from cardiac.files import InputError  # noqa: E402
from cardiac.layouts import read_cases  # noqa: E402

EXTREMES = [0, 1, 4, 127, 128, 255]
FLOATS = float("nan"), float("inf"), 1e30, 1e-30, -1.0
NUMBERS = [("<h", -1), ("<h", 32767), ("<i", 2**31 - 1), *(("<f", value) for value in FLOATS)]
WORDS = ["nan", "-1", "1e99", "0.5", "=1+1", "../x", '"', "\n", "\x00", ",", "é", "9" * 30, "A0A0A0"]


def mutate(data, rng, limit=None):
    """`data` with some bytes changed, only among the first `limit` if that is given."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(min(limit or len(data), len(data)))
        kind = rng.randrange(5)
        if kind == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place] = rng.choice(EXTREMES)
        elif kind == 2 and limit:
            code, value = rng.choice(NUMBERS)
            place -= place % 4
            data[place : place + struct.calcsize(code)] = struct.pack(code, value)
        elif kind == 3 and not limit:
            del data[place : place + rng.randrange(1, 50)]
        elif not limit:
            data[place:place] = rng.choice(WORDS).encode()
        if not data:
            return b""
    return bytes(data)


def spoil(root, rng):
    """Damage one file of a dataset; returns the kind of damage."""
    kind = rng.choice(("header", "header", "header", "gzip", "table", "cut"))
    tables = [path for path in root.rglob("*") if path.name == TABLE or path.name == "Info.cfg"]
    path = rng.choice(tables if kind == "table" else sorted(root.rglob("*.nii.gz")))
    data = path.read_bytes()
    if kind == "header":
        data = gzip.compress(mutate(gzip.decompress(data), rng, 352), 1)
    elif kind == "cut":
        data = data[: rng.randrange(len(data))]
    else:
        data = mutate(data, rng)
    path.write_bytes(data)
    return kind


def outcome(root):
    """Read everything; returns the outcome, in capitals if it is wrong."""
    try:
        dataset = read_cases(root)
    except InputError as fault:
        return "refused" if "\n" not in str(fault) else "TWO LINES"
    problems = list(dataset.problems)
    for case in dataset.cases:
        try:
            load_case(case)
        except InputError as fault:
            problems.append(str(fault))
    if any("\n" in problem for problem in problems):
        return "TWO LINES"
    return "named" if problems else "accepted"


def main(rounds, seed):
    counts, wrong = collections.Counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        shape = (16, 16, 2, 5)
        sources = [Path(folder) / "mms", Path(folder) / "acdc"]
        write_mms(sources[0], MMS_CASES[:4], shape)
        write_acdc(sources[1], 1, 1, shape)
        for number in range(seed, seed + rounds):
            rng, place = random.Random(number), Path(folder) / "spoilt"
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(sources[number % 2], place)
            try:
                kind = spoil(place, rng)
                result = outcome(place)
            except Exception:
                result = "RAISED"
                print(f"seed {number}:", traceback.format_exc(limit=-3), flush=True)
            counts[f"{kind}: {result}"] += 1
            wrong += result.isupper()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(*(f"{count:6} {what}" for what, count in sorted(counts.items())), sep="\n")
    print(f"{rounds} files, seeds {seed} to {seed + rounds - 1}: {wrong} wrong; peak memory {memory:.2f} GiB")
    return 1 if wrong or memory > 1 else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    sys.exit(main(**vars(parser.parse_args())))
