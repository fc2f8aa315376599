"""What the experiments share: jobs that are not done twice."""

import sys
from pathlib import Path

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
