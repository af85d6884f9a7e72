"""What the calls of the bars are made of: microseconds a kernel, of ours and of the dense layer.

Where Nsight Compute is on PATH and may count, also what bounds our main kernels.
"""

from __future__ import annotations

import csv
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import calls, child
from benchmarks.gpu.cases import Case
from benchmarks.gpu.timing import clock

REPEATS = 3  # of a call on a GPU, while it is profiled
MOST = 8  # kernels of a call that have a row
NAME = 60  # characters of a kernel's name
OURS, DENSE = "sparselottery", "dense"
COUNTED = 6  # calls whose main kernel Nsight Compute looks at
COUNT_LIMIT = 60  # seconds for all of them
MAIN_KERNELS = "spmm|sddmm|narrow|tiles|conv"
COUNTERS = {
    "gpu__time_duration.sum": ("us", 1e-3),
    "dram__bytes.sum": ("MB of memory", 1e-6),
    "lts__t_bytes.sum": ("MB of L2", 1e-6),
    "l1tex__t_sector_hit_rate.pct": ("% hits in L1", 1),
    "sm__inst_issued.avg.per_cycle_active": ("instructions a clock", 1),
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": ("% tensor cores", 1),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("% occupancy", 1),
    "launch__registers_per_thread": ("registers", 1),
}  # metric, what it is called here, and the factor from its base unit
TIME = next(iter(COUNTERS))


class Job(NamedTuple):
    """The kernels of a call; of None, the counters of the main kernels."""

    case: Case | None


def jobs(smoke: bool) -> list[Job]:
    return [*map(Job, calls.cases(smoke)[: 2 if smoke else None]), Job(None)]


def measure(job: Job, device: str, smoke: bool) -> list[dict]:
    """A row for each kernel of a call, the longest first; config says whose."""
    if job.case is None:
        return _counters(smoke)
    with calls.measuring(job.case, device):
        given, layer = calls.masked(job.case, device)
        rows = []
        for whose, module in ((OURS, layer), (DENSE, given.layer())):
            found = _kernels(calls.Call(module, given, job.case.op), device)
            total = sum(us for _, us, _ in found)
            rows += [
                _row(kernel, calls.name(job.case), whose, us, f"{launches:g} launches, {100 * us / total:.0f} %")
                for kernel, us, launches in found[:MOST]
            ]
        return rows


def summary(rows: list[dict]) -> list[str]:
    """A line for each call: our kernels beside the time of the dense layer. A line for each counted kernel."""
    lines, counted = [], [row for row in rows if row["config"] == "ncu"]
    profiled = [row for row in rows if row["config"] != "ncu"]
    for case, group in groupby(profiled, key=lambda row: row["case"]):
        found = list(group)
        ours, dense = ([row for row in found if row["config"] == whose] for whose in (OURS, DENSE))
        parts = " + ".join(f"{row['kernel'][:24]} {row['us']:g}" for row in ours[:3])
        lines.append(f"{case}: {_total(ours)} us = {parts}{' + ...' if len(ours) > 3 else ''}; dense {_total(dense)}")
    for row in counted:
        of = "ncu" if row["us"] == "" else f"ncu, {row['kernel']}, {row['case']}: {row['us']:g} us"
        lines.append(f"{of}: {row['detail']}")
    return lines


def _total(rows: list[dict]) -> str:
    return f"{sum(row['us'] for row in rows):.4g}"


def _row(kernel: str, case: str, config: str, us: float | str, detail: str) -> dict:
    us = us if us == "" else float(f"{us:.4g}")
    return {"part": "profile", "kernel": kernel, "case": case, "config": config, "us": us, "detail": detail}


def _kernels(call: Callable[[], object], device: str) -> list[tuple[str, float, float]]:
    """Name, microseconds and launches of each kernel in one call, the longest first; of the CPU, of each operator."""
    on_gpu = device == "cuda"
    repeats = REPEATS if on_gpu else 1
    call()
    clock(device).wait()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(repeats):
            call()
        clock(device).wait()
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    found = [
        (event.key.removeprefix("void ")[:NAME], us / repeats, event.count / repeats)
        for event in profiler.key_averages()
        if event.device_type == kind and (us := event.self_device_time_total if on_gpu else event.self_cpu_time_total)
    ]
    if not found:
        raise RuntimeError("expected kernels in the profile, got none: CUPTI does not work here")
    return sorted(found, key=lambda kernel: -kernel[1])


def _counters(smoke: bool) -> list[dict]:
    """Rows of Nsight Compute, or one that says why there are none."""
    if not (ncu := shutil.which("ncu")):
        return [_row("", "", "ncu", "", "not on PATH")]
    metrics, options = list(COUNTERS), ("--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none")
    while metrics:
        command = [ncu, *options, "--profile-from-start", "off", "--kernel-name", f"regex:{MAIN_KERNELS}",
                   "--metrics", ",".join(metrics), sys.executable, "-m", __spec__.name, *["smoke"] * smoke]  # fmt: skip
        status, output = child.run(command, COUNT_LIMIT)
        if not (unknown := set(re.findall(r"Failed to find metric (\S+)", output)) & set(metrics)):
            break
        metrics = [metric for metric in metrics if metric not in unknown]
    if rows := list(_parsed(output.splitlines())):
        return rows
    said = [line for line in output.splitlines() if line.startswith("==ERROR==")] or output.splitlines()[-1:] or [""]
    stopped = f"did not finish in {COUNT_LIMIT} s" if status is None else f"exit status {status}"
    return [_row("", "", "ncu", "", f"{stopped}: {said[0]}")]


def _parsed(lines: list[str]) -> Iterable[dict]:
    """Rows of `ncu --csv --page raw`: behind what others print, a header, a line of units, a line for each kernel."""
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    for each in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        if each["ID"]:
            values = {metric: each[metric].replace(",", "") for metric in COUNTERS if each.get(metric)}
            said = [
                f"{float(value) * COUNTERS[metric][1]:.4g} {COUNTERS[metric][0]}"
                for metric, value in values.items()
                if metric != TIME and re.fullmatch(r"[\d.e+-]+", value)
            ]
            us = float(values[TIME]) * COUNTERS[TIME][1] if TIME in values else ""
            where = f"launch {each['ID']}, grid {each.get('Grid Size', '')}"
            yield _row(each["Kernel Name"][:NAME], where, "ncu", us, ", ".join(said))


def main(smoke: bool, device: str = "cuda") -> None:
    """The calls that Nsight Compute counts, each once after it was compiled."""
    for case in calls.cases(smoke)[:COUNTED]:
        with calls.measuring(case, device):
            given, layer = calls.masked(case, device)
            call = calls.Call(layer, given, case.op)
            call()
            clock(device).wait()
            torch.cuda.profiler.start()
            call()
            clock(device).wait()
            torch.cuda.profiler.stop()


if __name__ == "__main__":
    main("smoke" in sys.argv[1:])
