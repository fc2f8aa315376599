"""Results of finished cases, kept until the run is finished; if interrupted, it resumes at the next case."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cardiac.files import InputError, digest, replacing, sync_folder

PARTS = ".parts"  # subfolder of a run's folder, removed when the run is finished


@dataclass(frozen=True)
class Parts:
    """A file for every finished case below `folder`; nothing is kept if that is None.

    made_from: what the results depend on besides the cases themselves, such as settings and weights, as JSON.
    Its digest is in the file names, so that results made from anything else are never used.
    """

    folder: Path | None = None
    made_from: tuple = ()

    def results(self, run, function, cases, arguments):
        """Yield `function(*arguments(case))`, a dict of JSON values and arrays, for each case in order.

        run: see `worker_pool`; a worker writes its part itself. Only cases without a part are computed.
        """
        if self.folder is None:
            yield from run(function, map(arguments, cases))
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        paths = [self._path(case) for case in cases]
        for path in set(self.folder.iterdir()) - set(paths):  # of other settings, or half written
            path.unlink()
        sync_folder(self.folder)
        missing = {path: case for path, case in zip(paths, cases) if not path.exists()}
        if len(missing) < len(cases):
            print(f"resuming: {len(cases) - len(missing)} of {len(cases)} cases are finished", flush=True)
        made = run(_compute_part, ((path, function, *arguments(case)) for path, case in missing.items()))
        for path in paths:
            if path in missing:
                next(made)
            yield read_part(path)

    def forget(self, case):
        """Remove the part of a case."""
        self._path(case).unlink(missing_ok=True)

    def _path(self, case):
        made_from = digest(json.dumps([self.made_from, case.identity()], sort_keys=True))
        return self.folder / f"{case.code}-{made_from}"


NO_PARTS = Parts()


def _compute_part(path, function, *arguments):
    write_part(path, function(*arguments))


def write_part(path, result):
    """Write a dict of JSON values and arrays: a line of JSON, then the arrays' bytes."""
    arrays = {name: value for name, value in result.items() if isinstance(value, np.ndarray)}
    values = {name: value for name, value in result.items() if name not in arrays}
    kinds = {name: (array.dtype.str, array.shape) for name, array in arrays.items()}
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(json.dumps([values, kinds]).encode() + b"\n")
        for array in arrays.values():  # no copy: a case's labels are megabytes
            file.write(np.ascontiguousarray(array))


def read_part(path):
    """Read a file from `write_part`, maybe untrusted: never more bytes than there are. Raises InputError."""
    try:
        with open(path, "rb") as file:
            (result, kinds), data = json.loads(file.readline()), file.read()
        position = 0
        for name, (kind, shape) in kinds.items():
            array = np.frombuffer(data, kind, math.prod(shape), position).reshape(shape)
            result[name], position = array, position + array.nbytes
        return result
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not readable ({str(error)[:80]}); remove it") from error
