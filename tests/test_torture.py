"""The campaign of random cases: some of each part, what it makes of cases that fail, crash or hang, and its rows."""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
import sys
from importlib import import_module

import pytest
import torch

from benchmarks import results
from benchmarks.torture import __main__ as torture
from benchmarks.torture import campaign, layers, sanitizers
from sparselottery import convert

CRASHING = """
import contextlib, itertools, os, time

@contextlib.contextmanager
def trial(folder):
    calls = itertools.count()
    def attempt(draw):
        print("what a case prints does not matter")
        number = next(calls)
        if number == 1:
            raise ValueError("wrong\\nnumber")
        if number == 2:
            {end}
    yield attempt
"""


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("part", "cases"), [("layers", 15), ("files", 60), ("threads", 8)])
def test_cases_in_this_process(part, cases, tmp_path):
    with import_module(f"benchmarks.torture.{part}").trial(tmp_path) as attempt:
        for number in range(cases):
            attempt(random.Random(f"{part} 0 {number}"))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits of processes")
@pytest.mark.parametrize(("part", "first"), [("kills", 21), ("saves", 3)])
def test_cases_in_processes_that_end(part, first):
    told = []
    outcome = campaign.run(part, 0, first, 1, 60.0, told.append)  # cases of `find`, interrupted
    assert outcome.tried == 1
    assert not outcome.failures, told


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_a_wrong_number_is_found(tmp_path, monkeypatch):
    def off_by_a_little(model, masks):
        model = convert(model, masks)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)
        return model

    monkeypatch.setattr(layers, "convert", off_by_a_little)
    found = 0
    with layers.trial(tmp_path) as attempt:
        for number in range(12):
            with contextlib.suppress(AssertionError):
                attempt(random.Random(f"layers 0 {number}"))
                continue
            found += 1
    assert found > 6  # others have no survivors, or no inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bound_follows_the_terms_of_a_sum(dtype):
    layer = torch.nn.Sequential(torch.nn.Linear(50, 2, bias=False)).double()
    x = torch.ones(1, 50, dtype=torch.float64)
    with torch.no_grad():
        layer[0].weight.copy_(torch.tensor([1000.0, -1000.0]).repeat(25).outer(torch.tensor([1.0, 1e-6])).t())
    y = layer(x)
    terms, exact = layers._rounded(layer, x, torch.ones_like(y))[0], y.detach().to(dtype)
    assert y[0, 0].item() == 0, "else the bound is of the sum"
    roundings = 3 * torch.finfo(dtype).eps * 50 * 1000
    layers.close("y", exact + roundings * torch.tensor([1.0, 0.0], dtype=dtype), exact, y, terms)
    for wrong in ([1000.0, 0.0], [0.0, roundings]):  # a term is missing; the roundings of another entry
        with pytest.raises(AssertionError, match="1 of 2"):
            layers.close("y", exact + torch.tensor([wrong], dtype=dtype), exact, y, terms)


def tried(tmp_path, end: str) -> tuple[int, list[tuple[int, str]]]:
    """What the campaign says of cases 10 to 14, of which the third ends so."""
    (tmp_path / "crashing.py").write_text(CRASHING.format(end=end))
    arguments = ["crashing", "0", "10", "5", "60", str(tmp_path)]
    return campaign.worker(arguments, {"PYTHONPATH": f"{campaign.ROOT}:{tmp_path}"}, tmp_path / "stderr")


def test_what_fails_and_what_crashes(tmp_path):
    count, failures = tried(tmp_path, "os.abort()")
    assert count == 3
    assert [number for number, _ in failures] == [11, 12]
    assert failures[0][1] == "ValueError: wrong number (crashing.py:11)"
    assert "ended with -6" in failures[1][1]
    assert "Fatal Python error: Aborted" in failures[1][1]


def test_what_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(campaign, "LIMIT", 1.0)
    count, failures = tried(tmp_path, "time.sleep(60)")
    assert count == 3
    assert "nothing for 1 s" in failures[1][1]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_the_openmp_of_our_own(tmp_path):
    """Its teams have their members, who know each other's number."""
    source = tmp_path / "main.cpp"
    source.write_text("""
        #include <cstdio>
        #include <omp.h>
        int main() {
            int seen[4] = {}, sizes = 0, inside = omp_in_parallel();
            #pragma omp parallel num_threads(4)
            {
                seen[omp_get_thread_num()] = 1 + omp_in_parallel();
                if (omp_get_thread_num() == 3) sizes = omp_get_num_threads();
            }
            std::printf("%d %d %d %d %d %d %d", inside, omp_in_parallel(), sizes, seen[0], seen[1], seen[2], seen[3]);
        }
    """)
    objects = []
    for each in (source, sanitizers.HERE / "openmp.cpp"):
        objects.append(str(tmp_path / f"{each.name}.o"))
        subprocess.run(["g++", "-std=c++17", "-fopenmp", "-c", str(each), "-o", objects[-1]], check=True)
    subprocess.run(["g++", *objects, "-pthread", "-o", str(tmp_path / "main")], check=True)
    assert subprocess.check_output([tmp_path / "main"], text=True) == "0 0 4 2 2 2 2"


def test_rows_add_up_and_a_campaign_goes_on(tmp_path, monkeypatch, capsys):
    calls = []

    def run(part, seed, first, cases, seconds, tell):
        calls.append((part, first, cases))
        return campaign.Outcome(7, [(3, "wrong")] if part == "kills" else [], 1.5)

    monkeypatch.setattr(campaign, "run", run)
    options = ["--seed", "5", "--minutes", "1", "--results", str(tmp_path)]
    assert torture.main(["layers", *options]) == 0
    assert torture.main(["kills", "layers", *options]) == 1
    assert calls == [("layers", 0, 10_000), ("kills", 0, 100), ("layers", 7, 9_993)]
    _, rows = results.read(tmp_path / "torture.csv")
    assert [(row["part"], row["tried"], row["failed"], row["seed"]) for row in rows] == [
        ("kills", 7, 1, 5),
        ("layers", 14, 0, 5),
    ]
    written = (tmp_path / "torture.csv").read_text()
    assert torture.main(["kills", *options, "--first", "3", "--cases", "1"]) == 1
    assert calls[-1] == ("kills", 3, 1)
    assert (tmp_path / "torture.csv").read_text() == written
    assert "kills: 7 cases" in capsys.readouterr().out
