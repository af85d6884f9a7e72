"""The committed tables are of our kernels, and say so."""

from __future__ import annotations

import csv

import pytest

pytest.importorskip("triton")

import triton

from sparselottery.kernels.gpu.audit import table
from sparselottery.kernels.gpu.audit.aot import TARGETS, triton_version
from sparselottery.kernels.gpu.audit.report import HEADER


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """A package with a table of its own."""
    (tmp_path / "audit").mkdir()
    (tmp_path / "kernel.py").write_text("first")
    monkeypatch.setattr(table, "_FOLDER", tmp_path / "audit")
    return tmp_path


HERE = ".".join(map(str, triton_version()))


def test_a_table_is_stale(sources):
    assert "expected table" in table.stale(HERE)
    with table.replacing() as file:
        csv.writer(file).writerows([HEADER, ["p"] * len(HEADER)])
    assert table.stale(HERE) is None
    assert [row["verdict"] for row in table.rows(HERE)] == ["p"]
    assert table.triton_of(HERE) == triton.__version__
    for name, text in ("kernel.py", "second"), ("new.py", ""):
        (sources / name).write_text(text)
        assert "make audit" in table.stale(HERE)
        with table.replacing():
            pass
        assert table.stale(HERE) is None


def test_an_audit_that_ends_early_leaves_the_table(sources):
    with table.replacing():
        pass
    before = table.path(HERE).read_text()
    with pytest.raises(KeyboardInterrupt), table.replacing():
        raise KeyboardInterrupt
    assert table.path(HERE).read_text() == before


@pytest.mark.parametrize("version", table.VERSIONS)
def test_the_tables_are_of_these_kernels(version):
    assert table.stale(version) is None
    rows = table.rows(version)
    assert {row["target"] for row in rows} == set(TARGETS)
    assert [row for row in rows if row["verdict"] != "ok"] == []
