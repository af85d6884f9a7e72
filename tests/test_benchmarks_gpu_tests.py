"""The tests of a GPU: whatever one of them, a plugin or the GPU does, the others run and every result is kept."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from benchmarks.gpu import shard, tests

SUITE = """
import os, time
import pytest

pytestmark = pytest.mark.gpu_core
CUDA = RuntimeError("CUDA error: an illegal memory access was encountered")

def test_fine():
    pass

def test_dies():
    os._exit(7)

def test_hangs():
    time.sleep(60)

def test_breaks_the_gpu(monkeypatch):
    import benchmarks.gpu.shard as shard
    shard.settle = lambda: (_ for _ in ()).throw(CUDA)

def test_wrong():
    assert 1 == 2, "one is not \\x00 two"

@pytest.mark.parametrize("n", range(3))
def test_after_all_that(n):
    import warnings
    warnings.warn("harmless")
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    (folder / "test_gpu_only.py").write_text(SUITE)
    (folder / "test_kernels_gpu_audit.py").write_text("def test_needs_no_gpu(): assert False")
    return folder


def test_tests_that_die_hang_or_break_the_gpu_take_no_other_along(suite):
    told, saved = [], []
    verdict = tests.run(tests.files(suite), tests.CORE, 100.0, 2, told.append, 5.0, save=lambda r: saved.append(len(r)))
    outcomes = {each.test.rpartition("::")[2]: each.outcome for each in verdict.results}
    passed = ["test_fine", *(f"test_after_all_that[{n}]" for n in range(3))]
    bad = {"test_dies": "ended with 7", "test_breaks_the_gpu": "GPU was lost"}
    bad["test_hangs"] = "did not finish in 5 s: "
    assert verdict.left == []
    assert [name for name in passed if outcomes.get(name) != "passed"] == []
    reasons = {each.test.rpartition("::")[2]: each.text for each in verdict.failed}
    assert reasons.keys() == {*bad, "test_wrong"}
    assert all(why in reasons[name] for name, why in bad.items())
    assert "test_gpu_only.py:15: KeyboardInterrupt" in reasons["test_hangs"]  # pytest was asked where it was
    assert len(told) == 4
    assert saved == sorted(saved)
    assert 0 < saved[0] < saved[-1] == len(verdict.results)  # long before the end, too
    again = tests.Verdict(tests.read_junit(tests.junit(verdict.results)))
    assert Counter(each.test for each in again.failed) == Counter(each.test for each in verdict.failed)
    (line,) = (line for line in again.lines() if "test_wrong" in line)
    assert "AssertionError: one is not" in line


def test_tests_end_in_time_and_a_broken_suite_is_told(suite, tmp_path):
    verdict = tests.run(tests.files(suite), tests.CORE, 0.0, 1, [].append)
    assert verdict.left == ["out of time in 1 of 1 processes"]
    assert verdict.fine
    (tmp_path / "test_gpu_only.py").write_text("import nothing_of_that_name")
    (tmp_path / "test_ops_gpu.py").write_text("def test_fine():\n    pass")
    verdict = tests.run(tests.files(tmp_path), tests.OTHERS, 60.0, 2, [].append)
    assert [(each.test, each.outcome) for each in verdict.results] == [
        ("test_gpu_only.py", "error"), ("test_ops_gpu.py::test_fine", "passed")
    ]  # fmt: skip
    assert "No module named 'nothing_of_that_name'" in verdict.lines()[1]
    assert tests.run([], tests.CORE, 60.0, 1, [].append).fine


def test_what_the_core_left_runs_with_the_others(tmp_path):
    (tmp_path / "test_gpu_only.py").write_text(
        "import pytest, time\n\n"
        "@pytest.mark.gpu_core\ndef test_quick():\n    pass\n\n"
        "@pytest.mark.gpu_core\ndef test_slow(tmp_path_factory):\n    time.sleep(2)\n\n"
        "def test_other():\n    pass\n"
    )
    found = tests.files(tmp_path)
    core = tests.run(found, tests.CORE, 1.9, 1, [].append)
    assert core.left == ["out of time in 1 of 1 processes"]
    others = tests.run(found, tests.OTHERS, 60.0, 1, [].append, done=core.results)
    names = [each.test.rpartition("::")[2] for each in (*core.results, *others.results)]
    assert sorted(names) == ["test_other", "test_quick", "test_slow"]


def test_plugins_and_options_of_the_machine_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")
    (tmp_path / "test_gpu_only.py").write_text(
        "def test_alone(pytestconfig):\n    assert not pytestconfig.pluginmanager.has_plugin('benchmark')\n"
    )
    verdict = tests.run(tests.files(tmp_path), tests.OTHERS, 60.0, 1, [].append)
    assert verdict.fine
    assert len(verdict.results) == 1


def test_pytest_that_breaks_goes_on_behind_the_test_that_broke_it(tmp_path):
    (tmp_path / "test_gpu_only.py").write_text(
        "import pytest\n\n\ndef test_leaves():\n    pytest.exit('no more')\n\n\ndef test_next():\n    pass\n"
    )
    verdict = tests.run(tests.files(tmp_path), tests.OTHERS, 60.0, 1, [].append)
    assert {each.test.rpartition("::")[2]: each.outcome for each in verdict.results} == {
        "test_leaves": "error", "test_next": "passed"
    }  # fmt: skip
    assert "no more" in verdict.failed[0].text


def test_a_shard_gives_back_its_memory_after_each_test_and_has_a_limit(monkeypatch):
    happened = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("synchronize", "empty_cache", "set_per_process_memory_fraction"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, name=name: happened.append((name, *args)))
    shard.pytest_collection_finish()
    shard.pytest_runtest_logfinish("tests/test_a.py::test_a")
    assert happened == [("set_per_process_memory_fraction", shard.MEMORY), ("synchronize",), ("empty_cache",)]
    assert 25 < shard.MEMORY * 80 < 80  # of an H100: more than the largest test takes


def test_the_device_gets_our_tests():
    names = {path.name for path in tests.files()}
    assert {"test_gpu_only.py", "test_kernels_gpu.py", "test_nn_gpu.py", "test_ops_gpu.py"} <= names
    assert not [name for name in names if "audit" in name]
