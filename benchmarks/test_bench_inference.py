"""Frozen inference: `load_sparse` against each runtime that is installed, dense ones and MNN's sparse kernels, fp32.

ms is the median of single calls, p99_ms what one in a hundred exceeds; speedup and speedup_p99 are theirs over ours.
"""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks import peers as training_peers
from benchmarks import results, timing
from benchmarks.inference_peers import NETS, frozen, peers
from sparselottery.bench_model import latencies

TOLERANCE = 1e-4
CASES = [(net, batch) for net in NETS for batch in ((1, 64) if net != "bert-base" else (1,))]


@pytest.mark.filterwarnings("ignore")  # of exporters and compilers
@pytest.mark.timeout(1800)  # compilers that try all their kernels take minutes
@pytest.mark.parametrize(("net", "batch"), CASES)
def test_inference(net, batch, benchmark, rows, request):
    sparse, dense = frozen(NETS[net])
    x = torch.randn(batch, *NETS[net].shape)
    with torch.no_grad():
        truth = [copy.deepcopy(dense).double()(x.double())]
    calls = {results.OURS: partial(sparse, x)}
    for name, make in peers(x).items():
        if name != "dense_compiled" or training_peers.COMPILER_MISSING is None:
            calls[name] = make(copy.deepcopy(dense), x)
    for name, call in calls.items():
        timing.check(name, [torch.as_tensor(call()).contiguous()], truth, TOLERANCE)
    times = latencies(calls, request.config.getoption("--seconds"))
    median, p99 = ({name: 1e3 * np.percentile(each, q) for name, each in times.items()} for q in (50, 99))
    for name in calls:
        row = {"net": net, "batch": batch, "density": NETS[net].density, "impl": name}
        row |= {
            "ms": f"{median[name]:.4g}",
            "p99_ms": f"{p99[name]:.4g}",
            "items_per_s": f"{1e3 * batch / median[name]:.4g}",
        }
        row |= {"speedup": f"{median[name] / median[results.OURS]:.3g}"}
        rows.append(row | {"speedup_p99": f"{p99[name] / p99[results.OURS]:.3g}", "calls": len(times[name])})
        benchmark.extra_info[f"vs {name}"] = row["speedup"]
    benchmark.pedantic(calls[results.OURS], rounds=timing.MIN_ROUNDS)
