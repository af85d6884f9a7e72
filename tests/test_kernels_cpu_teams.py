"""What a team of threads holds, and whether there is one: in processes of their own, where nothing else ran before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from sparselottery.kernels import native

pytestmark = [
    pytest.mark.skipif(not native.available(), reason=native.status()),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here, which tells memory and threads"),
]

START = """
    import torch
    from pathlib import Path
    from sparselottery import MaskedLinear, Pattern
    from sparselottery.kernels import cpu_train

    def status(key):
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines[key].split()[0])
"""
BACKWARD = """
    layer = MaskedLinear(512, 512, mask=torch.rand(512, 512) < 0.12)
    layer.execution = "sparse"
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for _ in range(2):
            y = layer(torch.ones(40_000, 512))
            y.backward(torch.ones_like(y))
            del y
        found.append(status("VmRSS"))
    print(found[1] - found[0])
"""
TRAINING = """
    torch.set_num_threads(2)
    pattern = Pattern.from_mask(torch.ones(10, 16, dtype=torch.bool))
    layer = cpu_train.Layer(16, *pattern.indices, torch.zeros(160), torch.zeros(10))
    trainer = cpu_train.Trainer([layer], "sgd", (0.9, 0.0))
    trainer._pace.copy_(torch.tensor(PACE))
    images, labels = torch.ones(20, 16), torch.zeros(20, dtype=torch.int64)
    before = status("Threads")
    trainer(images, labels, torch.zeros(4, 20, dtype=torch.int64), [0.1] * 4)
    print(status("Threads") - before)
"""
CHAIN = """
    torch.set_num_threads(2)
    layer = MaskedLinear(100, 50, mask=torch.rand(50, 100) < DENSITY)
    layer.execution = "sparse"
    x, before = torch.ones(20, 100, requires_grad=True), status("Threads")
    y = layer(x)
    y.backward(torch.ones_like(y))
    with torch.inference_mode():
        layer(x)
    print(status("Threads") - before)
"""


def number(script: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", dedent(START + script)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_sums_of_a_huge_batch_are_not_held_for_each_tile():
    """Of 40,000 samples they would be 40 MB or more, kept by the thread."""
    assert number(BACKWARD) < 20_000  # KiB


@pytest.mark.parametrize(("pace", "more"), [([6.0, 1.0, 2.0], 1), ([6.0, 2.0, 1.0], 0)])
def test_training_is_by_a_team_or_by_one_thread_as_is_faster(pace, more):
    assert number(TRAINING.replace("PACE", str(pace))) == more


@pytest.mark.parametrize(("density", "more"), [(0.02, 0), (0.99, 1)])
def test_very_few_products_start_no_team(density, more):
    assert number(CHAIN.replace("DENSITY", str(density))) == more
