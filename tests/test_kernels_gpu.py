"""The CSR kernels, chains and convolutions, on the GPU if there is one, else in Triton's interpreter (small sizes)."""

from __future__ import annotations

from itertools import pairwise, product

import convs
import pytest
import torch
from blocks import blocky
from chains import assert_accurate, assert_exact, make, of_masks
from gpus import DEVICE, DTYPES, run_chain, run_conv

from sparselottery.kernels import gpu, reference
from sparselottery.kernels.gpu import layout
from sparselottery.kernels.gpu.csr import plan as csr_plan

pytestmark = pytest.mark.usefixtures("poison")

GEOMETRIES = {
    "3x3": convs.geometry(3, sides=(1, 1, 1, 1)),
    "1x1": convs.geometry(3, (1, 1)),
    "strided": convs.geometry(2, (3, 3), (2, 3), (1, 1, 1, 1)),
    "all of it": convs.geometry(4, (3, 2), (2, 1), (1, 2, 0, 1), (1, 2), groups=2),
    "padding beyond the kernel": convs.geometry(2, (2, 2), (2, 2), (3, 3, 3, 3)),
}


def gaussian(*shape):
    return torch.randn(shape)


@pytest.mark.parametrize("batch_minor", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 16, 17, 48, 130])
@pytest.mark.parametrize("widths", [[5, 3], [1, 1], [33, 20, 4]])
def test_chain_equals_the_truth(widths, batch, batch_minor):
    chain = make(batch, widths, 0.3)
    assert_exact(run_chain(chain, batch_minor=batch_minor), chain)


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("batch", [2, 20])
def test_chain_of_nothing_and_of_everything(density, batch):
    chain = make(batch, [7, 9, 3], density, bias=density > 0)
    assert_exact(run_chain(chain), chain)


@pytest.mark.parametrize("batch", [2, 20])
def test_rows_of_every_weight(batch):
    mask = torch.zeros(6, 50, dtype=torch.bool)
    mask[1], mask[4, 3], mask[:, 7] = True, True, True  # a full row, a single weight, a full column
    chain = of_masks(batch, [mask])
    assert_exact(run_chain(chain), chain)


@pytest.mark.parametrize("batch", [16, 17, 32])
def test_packed_and_strided_inputs(batch):
    chain = make(batch, [9, 12, 5], 0.4)
    packed = reference.unpack(reference.pack(chain.x), batch)
    strided = chain.x.repeat(1, 2)[:, ::2].contiguous().repeat_interleave(2, 1)[:, ::2]
    for x in (packed, strided, chain.x.t().contiguous().t()):
        assert_exact(run_chain(make_with(chain, x=strided if x is strided else x)), make_with(chain, x=x))
    gy = chain.gy.t().contiguous().t()
    assert_exact(run_chain(make_with(chain, gy=gy)), chain)


def make_with(chain, **changes):
    return type(chain)(**{**vars(chain), **changes})


MIXED = {
    "blocks": [(16, 16), (16, 16)],
    "single weights, then blocks": [(1, 1), (16, 16)],
    "blocks, then single weights": [(16, 16), (1, 1)],
    "columns": [(16, 1), (16, 1), (16, 1)],
    "all": [(16, 16), (16, 1), (1, 1), (16, 16), (16, 1)],
}


@pytest.mark.parametrize("batch_minor", [False, True])
@pytest.mark.parametrize("batch", [3, 16])
@pytest.mark.parametrize("name", MIXED)
def test_layouts_between_kinds_of_layers(name, batch, batch_minor):
    blocks, widths = MIXED[name], [20, 37, 33, 18, 40, 5]
    masks = [
        blocky((o, i), block, layer, 0.6)
        for layer, ((i, o), block) in enumerate(zip(pairwise(widths), blocks, strict=False))
    ]
    chain = of_masks(batch, masks)
    assert_exact(run_chain(chain, blocks, batch_minor), chain)
    if batch == 16:
        packed = make_with(chain, x=reference.unpack(reference.pack(chain.x), batch))
        assert_exact(run_chain(packed, blocks, batch_minor), chain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [5, 70])
def test_chain_is_as_accurate_as_torch(dtype, batch):
    chain = make(batch, [60, 40, 30], 0.3, entries=gaussian).to(dtype)
    assert_accurate(run_chain(chain), chain)


@pytest.mark.parametrize("memory_format", convs.FORMATS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_conv_equals_the_truth(name, memory_format):
    for batch, relu in ((1, True), (17, False)):
        conv = convs.make(GEOMETRIES[name], 4, batch, (5, 6), 0.4, relu=relu, memory_format=memory_format)
        convs.assert_exact(run_conv(conv), conv)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_conv_of_nothing_and_of_everything(density):
    conv = convs.make(GEOMETRIES["3x3"], 3, 2, (3, 4), density, bias=density > 0)
    convs.assert_exact(run_conv(conv), conv)


@pytest.mark.parametrize("dtype", DTYPES)
def test_conv_is_as_accurate_as_torch(dtype):
    conv = convs.make(GEOMETRIES["3x3"], 8, 17, (4, 5), 0.4, entries=gaussian, relu=True).to(dtype)
    convs.assert_accurate(run_conv(conv), conv)


def test_only_what_is_needed_is_computed():
    chain = make(20, [9, 12, 5], 0.4)
    for need_x, *need in product([False, True], repeat=5):
        got = run_chain(chain, need_x=need_x, need_values=need[:2], need_bias=need[2:])
        wanted = ["y", *(["gx"] if need_x else [])]
        for kind, needs in (("gvalues", need[:2]), ("gbias", need[2:])):
            wanted += [f"{kind} {layer}" for layer, asked in enumerate(needs) if asked]
        assert all(got[name].numel() == 0 for name in got if name not in wanted)
        assert_exact({name: got[name] for name in wanted}, chain)


def test_plan_of_the_miniature():
    mask = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]], dtype=torch.bool)
    (pattern,) = of_masks(1, [mask]).patterns
    words = csr_plan.compile(pattern.crow_indices, pattern.col_indices, 4)
    plan = csr_plan.sections(words, 3, 4, 4)
    assert plan.order.tolist() == [0, 2, 1]
    assert plan.t_crow.tolist() == [0, 1, 2, 3, 4]
    assert plan.t_cols.tolist() == [0, 2, 2, 0]
    assert plan.perm.tolist() == [0, 2, 3, 1]
    assert plan.narrow.tolist() == [0, 3, 1, 2]


@pytest.mark.parametrize("memory_format", convs.FORMATS)
def test_layout_there_and_back(memory_format):
    images = torch.randn(5, 3, 4, 6, device=DEVICE).to(memory_format=convs.FORMATS[memory_format])
    rows = layout.pack(images, layout.Placing(4, 6))
    assert torch.equal(rows[:, :5], images.permute(1, 2, 3, 0).reshape(72, 5))
    assert not rows[:, 5 : layout.columns(5)].any()
    back = torch.empty_like(images)
    layout.unpack(rows, back)
    assert torch.equal(back, images)


def test_dtypes_and_plans_that_are_not_supported_are_refused():
    plan = gpu.Plan(torch.zeros(4, dtype=torch.int32), (1, 1))
    assert gpu.supports(torch.float32, [plan])
    assert not gpu.supports(torch.float64, [plan])
    assert not gpu.supports(torch.float32, [plan, gpu.Plan(plan.words[:0], (1, 1))])
