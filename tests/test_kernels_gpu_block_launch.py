"""How block kernels are launched: grids and shapes. Nothing is multiplied, and no memory is written."""

from __future__ import annotations

import pytest
import torch
from convs import geometry

from sparselottery import Pattern

triton = pytest.importorskip("triton")
from sparselottery.kernels import gpu  # noqa: E402
from sparselottery.kernels.gpu import Plan, block  # noqa: E402
from sparselottery.kernels.gpu.device import assumed  # noqa: E402
from sparselottery.kernels.gpu.launch import overridden, recorded  # noqa: E402

CPU = torch.device("cpu")
TURING, AMPERE, ADA = ((7, 5), 64 << 10), ((8, 0), 163 << 10), ((8, 9), 99 << 10)  # capability, shared memory
SPMM, SDDMM = "_block_spmm_kernel", "_block_sddmm_kernel"
GRID_LIMIT = 65535  # of CUDA, for grid y and z


def huge(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor of any shape, of one number in memory."""
    return torch.zeros(1, dtype=dtype).expand(shape)


def planned(mask: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16, of=None):
    """(values, indices, plan) of a layer."""
    pattern = Pattern.from_mask(mask.flatten(1))
    indices = pattern.crow_indices, pattern.col_indices
    words = block.plan.build(*indices, pattern.shape[1], shape, of)
    return torch.zeros(pattern.nnz, dtype=dtype), indices, Plan(words, shape)


def full(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


def linear_launches(batch: int, mask: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16):
    """Of a layer forward and backward."""
    values, indices, plan = planned(mask, shape, dtype)
    x, y = (huge(batch, features, dtype=dtype) for features in reversed(mask.shape))
    with recorded() as launches:
        block.forward(x, values, None, *indices, plan, y)
        block.grad_x(y, values, *indices, plan, x)
        block.grad_values(y, x, *indices, plan)
    return launches


def conv_launches(
    batch: int, size: int, mask: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16
):
    """Of a convolution with padding, forward and backward."""
    kernel = tuple(mask.shape[2:])
    of = geometry(mask.shape[1], kernel, sides=[side // 2 for side in kernel for _ in range(2)])
    values, indices, plan = planned(mask, shape, dtype, of)
    x, y = (huge(batch, channels, size, size, dtype=dtype) for channels in reversed(mask.shape[:2]))
    with recorded() as launches:
        block.conv_forward(x, values, None, *indices, plan, of, y)
        block.conv_grad_x(y, values, *indices, plan, of, x)
        block.conv_grad_values(y, x, *indices, plan, of)
    return launches


@pytest.mark.parametrize(
    "launches",
    [
        lambda: linear_launches(2**24, full(64, 64), (64, 64)),
        lambda: linear_launches(2**24, full(512, 8), (8, 8)),
        lambda: conv_launches(512, 224, full(64, 64, 3, 3), (64, 64)),
    ],
    ids=["samples", "samples and rows", "images"],
)
def test_grids_are_within_the_limits_of_cuda(launches):
    """The first dimension may have 2**31 - 1 programs, the others far fewer."""
    grids = [launch.grid for launch in launches()]
    assert max(grid[0] for grid in grids) > GRID_LIMIT
    assert all(grid[0] < 2**31 and max(grid[1:], default=1) <= GRID_LIMIT for grid in grids)


@pytest.mark.parametrize("shape", [(16, 16), (32, 1)], ids=str)
def test_old_gpus_have_no_blocks(shape):
    assert gpu.takes_block(shape, CPU)
    with assumed(*TURING):
        assert not gpu.takes_block(shape, CPU)
        assert not gpu.takes_block((16, 16), CPU, geometry(16))


def test_old_gpus_have_single_weights_but_no_bf16():
    words = torch.zeros(4, dtype=torch.int32)
    single, blocks = Plan(words, (1, 1)), Plan(words, (16, 16))
    assert gpu.supports(torch.bfloat16, [single, blocks])
    with assumed(*TURING):
        assert gpu.supports(torch.float16, [single])
        assert not gpu.supports(torch.bfloat16, [single])
        assert not gpu.supports(torch.float16, [single, blocks])


def test_status_says_what_an_old_gpu_lacks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with assumed(*ADA):
        assert gpu.status().endswith(", a card")
    with assumed(*TURING):
        assert (
            "a card (bf16 on the torch reference and no blocks: expected compute capability 8.0, got 7.5)"
            in gpu.status()
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("side", [16, 64, 128])
def test_stages_fit_into_shared_memory(side, dtype):
    """What three stages of a step need; two where they do not fit."""
    found = {}
    for shared in (227 << 10, 48 << 10):
        with assumed((9, 0), shared):
            launches = linear_launches(4096, full(1024, 1024), (side, side), dtype)
            launches += conv_launches(32, 32, full(256, 256, 1, 1), (side, side), dtype)
        for launch in launches:
            if (size := step_bytes(launch)) is not None:
                stages = launch.options["num_stages"]
                assert stages == (3 if 3 * size <= shared else 2)
                found.setdefault(shared, set()).add(stages)
    assert found[227 << 10] == {3}
    assert 2 in found[48 << 10] or side == 16


def step_bytes(launch) -> int | None:
    """Of what a step of a loop over tiles multiplies."""
    of = launch.arguments
    if launch.kernel.__name__ in ("_block_spmm_kernel", "_block_conv_kernel"):
        return (of["BM"] + of["OUT"]) * of["BK"] * of["x"].element_size()
    if "sddmm" in launch.kernel.__name__:
        return (of["K"] + of["R"]) * of["BM"] * of["x"].element_size()
    return None


def kernels(launches) -> dict[str, list]:
    found: dict[str, list] = {}
    for launch in launches:
        found.setdefault(launch.kernel.__name__, []).append(launch)
    return found


def test_large_tiles_where_programs_are_many():
    few, many = (
        [launch.arguments["BM"] for launch in kernels(linear_launches(batch, full(1024, 1024), (64, 64)))[SPMM]]
        for batch in (4096, 8192)
    )
    assert few == [128, 128]
    assert many == [256, 256]


def test_sddmm_has_four_waves_of_programs_of_some_steps():
    (few,) = kernels(linear_launches(2**14, full(1024, 1024), (64, 64)))[SDDMM]
    (none,) = kernels(linear_launches(64, full(1024, 1024), (64, 64)))[SDDMM]
    assert few.grid[0] >= 4 * 132 * 4 > few.grid[0] - 256  # of 48 kB of shared memory: four fit on a multiprocessor
    assert none.grid == (256,)


def test_splits_are_the_same_on_all_gpus():
    """They decide in which order samples are added."""
    here, there = (kernels(launched(limits)) for limits in (((9, 0), 227 << 10), ADA))
    assert [launch.grid for launch in here[SDDMM]] == [launch.grid for launch in there[SDDMM]]


def launched(limits):
    with assumed(*limits):
        return linear_launches(4096, full(1024, 1024), (64, 64))


@pytest.mark.parametrize(
    ("name", "kernel", "fields"),
    [
        ("block_spmm", "_block_spmm_kernel", {"bm": 64, "bk": 16, "warps": 8, "stages": 2}),
        ("block_sddmm", "_block_sddmm_kernel", {"bm": 32, "splits": 3, "warps": 8, "stages": 2}),
        ("block_conv", "_block_conv_kernel", {"bm": 64, "bk": 16, "warps": 8, "stages": 2}),
        ("block_conv_sddmm", "_block_conv_sddmm_kernel", {"bm": 32, "splits": 3, "warps": 8, "stages": 2}),
    ],
)
def test_launch_shapes_can_be_overridden(name, kernel, fields):
    with overridden(name, **fields):
        launches = kernels(
            linear_launches(512, full(64, 64), (64, 64)) + conv_launches(8, 8, full(64, 64, 1, 1), (64, 64))
        )
    for launch in launches[kernel]:
        assert launch.arguments["BM"] == fields["bm"]
        assert launch.options["num_warps"], launch.options["num_stages"] == (8, 2)
        if "bk" in fields:
            assert launch.arguments["BK"] == 16
        else:
            assert launch.grid == (4 * 3,)  # there are four places for tiles, one of them taken
            assert launch.arguments["steps"] == -(-512 // 32 // 3)


def test_a_tile_holds_whole_steps():
    with overridden("block_spmm", bk=128), pytest.raises(ValueError, match="bk: expected a divisor of 64, got 128"):
        linear_launches(16, full(64, 64), (64, 64))


@pytest.fixture
def backends():
    """Where torch holds whether it may multiply fp32 in TF32; afterwards as before."""
    found = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [each.fp32_precision for each in found]
    yield found
    for each, precision in zip(found, before, strict=True):
        each.fp32_precision = precision


@pytest.mark.parametrize(
    ("limits", "tf32", "expected"),
    [
        (((9, 0), 227 << 10), False, "tf32x3"),
        (AMPERE, False, "ieee"),
        (((9, 4), 64 << 10), False, "ieee"),
        (AMPERE, True, "tf32"),
        (((9, 0), 227 << 10), True, "tf32"),
    ],
)
def test_products_of_fp32(limits, tf32, expected, backends):
    for backend in backends:
        backend.fp32_precision = "tf32" if tf32 else "ieee"
    with assumed(*limits):
        launches = linear_launches(64, full(64, 64), (32, 32), torch.float32)
        launches += conv_launches(4, 8, full(64, 64, 1, 1), (32, 32), torch.float32)
    precisions = [each.arguments["PRECISION"] for each in launches if "PRECISION" in each.arguments]
    assert precisions == [expected] * 6
