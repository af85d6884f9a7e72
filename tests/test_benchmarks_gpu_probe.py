"""The question of a 2:4 cover: its rows and its verdict, with a dense product in the place of cuSPARSELt's."""

from __future__ import annotations

import pytest
import torch
from gpus import DEVICE

from benchmarks.gpu import calls, probe, timing


def test_a_cover_keeps_two_of_four():
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 1, 0], [0, 1, 1, 1, 1, 0, 0, 1]], dtype=torch.bool)
    expected = [[1, 1, 0, 0, 0, 0, 1, 0], [0, 1, 1, 0, 1, 0, 0, 1]]
    assert probe.cover(mask).int().tolist() == expected


VERDICTS = {"1.00x of dense at best: not worth code": {}, "2.00x of dense at best: worth code": {probe.DENSE: 2.0}}


@pytest.fixture
def still(monkeypatch):
    """Results are checked, nothing is timed."""

    class Clock(timing.CpuClock):
        def seconds(self, run, times):
            return 1e-6

    monkeypatch.setattr(probe, "clock", lambda device: Clock())


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize("verdict", VERDICTS)
def test_cover_and_remainder_are_the_layer(verdict, monkeypatch):
    raced = timing.race

    def race(entries, *args, **options):
        result = raced(entries, *args, **options)
        assert not result.failures
        result.seconds = {name: 1e-6 * VERDICTS[verdict].get(name, 1.0) for name in entries}
        return result

    monkeypatch.setattr(probe, "race", race)
    monkeypatch.setattr(probe, "_product", lambda weight, x: lambda: x @ weight.t())
    job = probe.jobs(smoke=True)[0]
    rows = probe.measure(job, DEVICE, smoke=True)
    assert all(list(row) == ["part", "kernel", "case", "config", "us", "detail"] for row in rows)
    assert [row["kernel"] for row in rows] == [probe.DENSE, probe.BOTH, probe.COVER, probe.REMAINDER]
    with calls.measuring(job.case, DEVICE):
        mask = calls.problem(job.case, DEVICE).mask
    assert 80 < (share := 100 * probe.cover(mask).sum().item() / mask.sum().item()) < 100
    assert rows[0]["config"] == f"covers {share:.2f} %"
    assert probe.summary(rows)[-1] == f"2:4 cover of single weights: {verdict}"


@pytest.mark.usefixtures("still")
def test_without_cusparselt_there_is_a_reason(monkeypatch):
    def no_product(weight, x):
        raise RuntimeError("cuSPARSELt not supported on your machine.")

    monkeypatch.setattr(probe, "_product", no_product)
    rows = probe.measure(probe.jobs(smoke=True)[-1], DEVICE, smoke=True)
    why = {row["kernel"]: row["detail"] for row in rows if row["us"] == ""}
    assert why.keys() == {probe.BOTH, probe.COVER}
    assert "not supported" in why[probe.COVER]
    assert probe.summary(rows)[-1].endswith("no answer")
    assert probe.summary([]) == []


@pytest.mark.usefixtures("still")
def test_a_cover_that_is_wrong_has_no_time(monkeypatch):
    monkeypatch.setattr(probe, "_product", lambda weight, x: lambda: 1.1 * (x @ weight.t()))
    rows = probe.measure(probe.jobs(smoke=True)[0], DEVICE, smoke=True)
    why = {row["kernel"]: row["detail"] for row in rows if row["us"] == ""}
    assert why.keys() == {probe.BOTH, probe.COVER}
    assert all("is wrong by" in each for each in why.values())
