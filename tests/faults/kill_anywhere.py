"""Kill the four scripts at random moments, again and again, and compare with an undisturbed run.

    python tests/faults/kill_anywhere.py --kills 100 --seed 0

A kill is SIGKILL, SIGTERM or SIGINT to the script's process, or SIGTERM to it and its workers. It must leave
no truncated file, and the same command, run again, must end with the same files. A round is all four scripts
in a fresh OUT. Prints seeds and differences; exit status 1 if there are any.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from datasets import write_mms  # noqa: E402
from snapshot import content, differences, snapshot  # noqa: E402

STEPS = "--steps-per-epoch 4 --max-steps 12 --batch-size 4"
SCRIPTS = {
    "train_registration.py": f"--size 32 --spacing 2 {STEPS}",
    "propagate_labels.py": "--nifti",
    "train_segmentation.py": f"{STEPS} --channels 2",
    "evaluate.py": "--all-frames",
}
SIGNALS = ["KILL", "KILL", "KILL", "TERM", "INT", "TERM to all"]
EXITS = {"KILL": {-9}, "TERM": {143, -15}, "INT": {130, -2}, "TERM to all": {143, -15}}


def command(script, data, out, workers):
    options = f"--data {data} --out {out} --workers {workers} --device cpu {SCRIPTS[script]}"
    return [sys.executable, str(TESTS.parent / script), *options.split()]


def start(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "bufsize": 1}
    return subprocess.Popen(command(*arguments), env=environment, start_new_session=True, **pipes)


def timed(*arguments):
    """Run a script to its end; returns the seconds since its first line, when torch has been imported."""
    process = start(*arguments)
    process.stdout.readline()
    begun = time.monotonic()
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return time.monotonic() - begun


def kill(process, how):
    number = getattr(signal, f"SIG{how.split()[0]}")
    (os.killpg if "all" in how else os.kill)(process.pid, number)


def whole(out):
    """Yield a line for every file below `out` that has its final name but is incomplete."""
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        if not path.name.startswith(".tmp-"):
            try:
                content(path)
            except Exception as error:
                yield f"incomplete: {path}: {error}"


def run_through(script, data, out, workers, rng, seconds):
    """Run a script to its end through random kills; returns (kills, lines of what was wrong)."""
    kills, wrong = 0, []
    while True:
        process = start(script, data, out, workers)
        how, moment = rng.choice(SIGNALS), rng.uniform(0, 0.8 * seconds)
        try:
            spared = rng.random() < 0.2  # otherwise it would take many kills to finish
            if rng.random() < 0.9:  # else it may be killed before it has begun
                process.stdout.readline()
            _, errors = process.communicate(timeout=None if spared else moment)
        except subprocess.TimeoutExpired:
            kill(process, how)
            _, errors = process.communicate()
            if process.returncode:  # else it had just finished
                kills += 1
                print(f"  {script} {how} after {moment:.2f} s: exit {process.returncode}", flush=True)
                wrong += whole(out.parent)
                if process.returncode not in EXITS[how]:
                    wrong.append(f"exit {process.returncode} by {how}: {errors.strip()[-300:]}")
                continue
        if process.returncode == 0:
            return kills, wrong
        return kills, [*wrong, f"{script}: exit {process.returncode}: {errors[-500:]}"]


def main(kills, seed, minutes):
    begun, done, wrong, rounds, seconds = time.monotonic(), 0, [], 0, {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = write_mms(folder / "MnM")
        for script in SCRIPTS:
            seconds[script] = timed(script, data, folder / "whole" / "run", 1)
        expected = snapshot(folder / "whole")
        while done < kills and time.monotonic() - begun < 60 * minutes:
            rng, place = random.Random(seed + rounds), folder / f"round{rounds}"
            workers = 1 + rounds % 2
            print(f"round {rounds}, seed {seed + rounds}, {workers} workers", flush=True)
            for script in SCRIPTS:
                count, found = run_through(script, data, place / "run", workers, rng, seconds[script])
                done, wrong = done + count, wrong + found
            found = differences(without_workers(expected), without_workers(snapshot(place)))
            print(*(f"  {line}" for line in wrong + found), sep="\n", flush=True)
            wrong, rounds = wrong + found, rounds + 1
    print(f"{done} kills in {rounds} rounds, seeds {seed} to {seed + rounds - 1}: {len(wrong)} differences")
    return 1 if wrong else 0


def without_workers(files):
    """`files` without the number of workers in config.json, the only thing that may differ with it."""
    files = dict(files)
    for name in (name for name in files if name.endswith("config.json")):
        files[name] = {**files[name], "settings": {**files[name]["settings"], "workers": 0}}
    return files


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600)
    sys.exit(main(**vars(parser.parse_args())))
