"""What the experiments share: jobs that are not done twice, intervals."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))


def test_a_job_that_has_rows_is_not_done_again_and_one_that_failed_is(tmp_path):
    from common import results

    path, called = tmp_path / "rows.csv", []

    def run(seed, fail=True):
        called.append(seed)
        if seed == 1 and fail:
            raise KeyboardInterrupt
        return [{"dice": 0.5 + seed}, {"dice": 0.25}]

    jobs, columns = [{"seed": 0}, {"seed": 1}], ("seed", "dice")
    with pytest.raises(KeyboardInterrupt):
        results(path, columns, jobs, run)
    rows = results(path, columns, jobs, lambda seed: run(seed, fail=False))
    assert called == [0, 1, 1]
    assert [row["seed"] for row in rows] == ["0", "0", "1", "1"]
    assert [float(row["dice"]) for row in rows] == [0.5, 0.25, 1.5, 0.25]
    assert len(results(path, columns, jobs[:1], run)) == 2, "rows of other jobs stay in the file alone"
    assert results(path, columns, jobs, run) == rows


def test_an_interval_leaves_out_what_a_repetition_lacks():
    from common import interval

    differences = np.random.default_rng(0).normal(1, 0.5, (3, 40))
    mean, low, high = interval(differences, resamples=400)
    assert mean == pytest.approx(differences.mean())
    assert mean - 0.5 < low < mean < high < mean + 0.5
    differences[1, 7] = np.nan
    expected = np.nanmean(differences), low, high
    assert interval(differences, resamples=400) == pytest.approx(expected, abs=0.05)
