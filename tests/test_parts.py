"""Finished cases are kept until the run is finished: never redone, mistaken for others or left behind."""

import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cardiac.files import InputError
from cardiac.parts import NO_PARTS, Parts, read_part, write_part
from cardiac.workers import worker_pool


class Killed(BaseException):
    """As if by SIGKILL."""


# -------------------------------------------------------------------------------------- what a part holds

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
KINDS = [np.float16, np.float32, np.float64, np.uint8, np.int64, np.bool_]
ARRAYS = arrays.arrays(st.sampled_from(KINDS), arrays.array_shapes(min_dims=0, max_dims=4, min_side=0))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.dictionaries(st.text(), JSON | ARRAYS, max_size=4))
def test_there_and_back(tmp_path_factory, result):
    path = tmp_path_factory.getbasetemp() / "part"
    write_part(path, result)
    found = read_part(path)
    assert set(found) == set(result)
    for name, value in result.items():
        if isinstance(value, np.ndarray):
            assert found[name].dtype == value.dtype
            np.testing.assert_array_equal(found[name], value)
        else:
            assert found[name] == value


def test_nan_and_the_last_digit_of_a_score_are_kept(tmp_path):
    write_part(tmp_path / "part", {"dice": [1 / 3, math.nan], "hd": float(np.float32(0.1))})
    found = read_part(tmp_path / "part")
    assert found["dice"][0] == 1 / 3
    assert math.isnan(found["dice"][1])
    assert found["hd"] == np.float32(0.1)


HOSTILE = [
    b"", b"{}", b"[1, 2]\n", b"[{}, {\"a\": [\"|O\", [1]]}]\n12345678", b"\xff\xfe\n", b"[{}, {\"a\": 3}]\n",
    b"[{}, {\"a\": [\"<f8\", [1000000000000]]}]\n12345678", b"[{}, {\"a\": [\"<f8\", [-1, 1]]}]\n1234",
]


@pytest.mark.parametrize("data", HOSTILE)
def test_what_is_no_part_is_one_line_and_no_more_memory_than_the_file(tmp_path, data):
    (tmp_path / "part").write_bytes(data)
    with pytest.raises(InputError, match=r"part: not readable .*; remove it"):
        read_part(tmp_path / "part")


# ------------------------------------------------------------------------------------ which parts are reused


class Cases:
    """Three cases; `square` records which it is called for."""

    def __init__(self):
        self.cases = [
            SimpleNamespace(code=code, identity=lambda code=code: self.known[code]) for code in "ABC"
        ]
        self.known, self.called, self.dies = dict.fromkeys("ABC", 1), [], None

    def square(self, code):
        if code == self.dies:
            raise Killed
        self.called.append(code)
        return {"code": code, "square": np.array([ord(code) ** 2])}

    def results(self, folder, made_from=("weights",)):
        self.called = []
        with worker_pool(1, 3) as run:
            arguments = lambda case: (case.code,)  # noqa: E731
            found = list(Parts(folder, made_from).results(run, self.square, self.cases, arguments))
        assert [(each["code"], int(each["square"][0])) for each in found] == [(c, ord(c) ** 2) for c in "ABC"]
        return self.called


@pytest.fixture
def cases(tmp_path):
    """`Cases` whose run was killed at the last one."""
    cases = Cases()
    cases.dies = "C"
    with pytest.raises(Killed):
        cases.results(tmp_path)
    assert cases.called == ["A", "B"]
    cases.dies = None
    return cases


def test_a_killed_run_goes_on_with_the_next_case(cases, tmp_path, capsys):
    assert cases.results(tmp_path) == ["C"]
    assert capsys.readouterr().out == "resuming: 2 of 3 cases are finished\n"
    assert cases.results(tmp_path) == []


def test_parts_of_other_weights_or_settings_are_not_taken_and_go(cases, tmp_path):
    assert cases.results(tmp_path, ("others",)) == ["A", "B", "C"]
    assert len(list(tmp_path.iterdir())) == 3
    assert cases.results(tmp_path) == ["A", "B", "C"], "what the others overwrote is redone"


def test_a_case_that_changed_is_made_again_alone(cases, tmp_path):
    cases.known["A"] = 2
    assert cases.results(tmp_path) == ["A", "C"]


def test_what_was_half_written_goes(cases, tmp_path):
    (tmp_path / ".tmp-C-0123").write_text("half")
    cases.results(tmp_path)
    assert not list(tmp_path.glob(".tmp-*"))


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with worker_pool(1, 1) as run:
        (found,) = NO_PARTS.results(run, dict, [1], lambda case: [[("case", case)]])
    assert found == {"case": 1}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_write_their_parts_themselves(tmp_path, workers):
    cases = Cases().cases
    with worker_pool(workers, 3) as run:
        results = Parts(tmp_path).results(run, _process, cases, lambda case: (case.code,))
        found = {each["process"] for each in results}
    assert (os.getpid() in found) == (workers == 1)
    assert len(list(tmp_path.iterdir())) == 3


def _process(code):
    return {"code": code, "process": os.getpid()}
