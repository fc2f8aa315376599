"""Run the four scripts on a full disk, again and again with a little more space, until they finish.

    sudo python tests/faults/full_disk.py --step 64

The disk is a tmpfs (mount needs root), which grows by so many KiB after every failure. Every failure must
give one line, exit status 2 and no truncated or temporary file; the results must be those of a large disk.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from datasets import write_mms  # noqa: E402
from kill_anywhere import SCRIPTS, start, timed, whole  # noqa: E402
from snapshot import differences, snapshot  # noqa: E402


def attempt(arguments, place):
    """Run a script; returns None if it finishes, else a list of what was wrong with its failure."""
    process = start(*arguments)
    _, errors = process.communicate()
    if process.returncode == 0:
        return None
    last = errors.strip().splitlines()[-1]
    wrong = [*whole(place), *(f"left: {path}" for path in place.rglob(".tmp-*"))]
    if process.returncode != 2 or "Traceback" in errors or "No space left on device" not in last:
        wrong.append(f"exit {process.returncode}: {errors[-400:]}")
    return wrong


def main(step):
    failures, wrong = 0, []
    with tempfile.TemporaryDirectory() as folder:
        data, disk = write_mms(Path(folder) / "MnM"), Path(folder) / "disk"
        for script in SCRIPTS:
            timed(script, data, Path(folder) / "whole" / "run", 1)
        disk.mkdir()
        size = 16
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", disk], check=True)
        try:
            for script in SCRIPTS:
                while (found := attempt((script, data, disk / "run", 1), disk)) is not None:
                    failures, wrong, size = failures + 1, wrong + found, size + step
                    print(f"{script}: full at {size - step} KiB", *found, sep="\n  ", flush=True)
                    subprocess.run(["mount", "-o", f"remount,size={size}k", disk], check=True)
            wrong += differences(snapshot(Path(folder) / "whole"), snapshot(disk))
        finally:
            subprocess.run(["umount", disk], check=True)
    print(f"{failures} times full, {len(wrong)} differences", *wrong, sep="\n  ")
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", type=int, default=256, help="KiB added after every failure")
    sys.exit(main(parser.parse_args().step))
