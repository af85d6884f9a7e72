"""The CSR kernels, chains and convolutions, on the GPU if there is one, else in Triton's interpreter (small sizes)."""

from __future__ import annotations

import math
from itertools import pairwise, product

import convs
import numpy as np
import pytest
import torch
from blocks import blocky
from chains import assert_accurate, assert_exact, make, of_masks
from gpus import DEVICE, DTYPES, run_chain, run_conv

from sparselottery.kernels import gpu, reference
from sparselottery.kernels.gpu import layout
from sparselottery.kernels.gpu.csr import plan as csr_plan
from sparselottery.kernels.gpu.device import assumed
from sparselottery.kernels.gpu.launch import overridden, recorded

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


def test_a_row_much_longer_than_others():
    masks = [torch.rand(5, 200) < 0.02, torch.rand(200, 5) < 0.02]
    masks[0][1] = masks[1][:, 2] = True  # long also in the transpose
    chain = of_masks(70, masks)
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


@pytest.mark.gpu_core
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


def ill(x):
    """x with a NaN and infinities of both signs, in samples of their own."""
    x = x.clone()
    x[0, 1], x[1, 2], x[2, 0] = math.nan, math.inf, -math.inf
    return x


def assert_same(got, expected):
    assert not expected.isfinite().all(), "the test itself: expected NaN or infinity"
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def no_warnings_of_numpy():
    """The interpreter multiplies by it, and it warns of 0 * infinity."""
    with np.errstate(invalid="ignore"):
        yield


@pytest.mark.usefixtures("no_warnings_of_numpy")
@pytest.mark.parametrize("batch", [4, 70])  # by the narrow kernel and by the wide one
def test_nan_and_infinity_go_where_surviving_weights_carry_them(batch):
    masks = [torch.rand(9, 9) < 0.5, torch.rand(6, 9) < 0.5]
    masks[0][4] = masks[0][:, 5] = masks[1][2] = False
    masks[0][3] = masks[1][:, 3] = True
    chain = of_masks(batch, masks)
    chain = make_with(chain, x=ill(chain.x), gy=ill(chain.gy.flip(0)).flip(0))
    weights = [torch.zeros(m.shape).masked_scatter(m, v) for m, v in zip(masks, chain.values, strict=True)]
    h = torch.where(masks[0], chain.x[:, None] * weights[0], 0).sum(2) + chain.biases[0]
    h = h.clamp(min=0)  # keeps NaN
    y = torch.where(masks[1], h[:, None] * weights[1], 0).sum(2) + chain.biases[1]
    gh = torch.where(masks[1], chain.gy[:, :, None] * weights[1], 0).sum(1)
    gh = torch.where(h <= 0, 0, gh)  # through NaN it passes, as in torch
    gx = torch.where(masks[0], gh[:, :, None] * weights[0], 0).sum(1)
    expected = {"y": y, "gx": gx, "gvalues 0": (gh.t() @ chain.x)[masks[0]], "gvalues 1": (chain.gy.t() @ h)[masks[1]]}
    got = run_chain(chain)
    for name in expected:
        assert_same(got[name], expected[name])


@pytest.mark.usefixtures("no_warnings_of_numpy")
def test_relu_of_a_convolution_keeps_nan():
    conv = convs.make(convs.geometry(2, (2, 2)), 2, 4, (3, 3), 1.0, relu=True)
    x, gy = (ill(images.flatten(1)).view(images.shape) for images in (conv.x, conv.gy))
    wide = make_with(conv, x=x, gy=gy).to(torch.float64)
    indices = wide.pattern.crow_indices, wide.pattern.col_indices, None, conv.geometry, True, 1
    y, winners = reference.conv_forward(wide.x, wide.values, wide.bias, *indices)
    assert y.isnan().any()
    grads = reference.conv_backward(wide.gy, wide.x, y, winners, wide.values, *indices, True, True, True)
    got = run_conv(make_with(conv, x=x, gy=gy))
    for name, expected in zip(("y", "gx", "gvalues", "gbias"), (y, *grads), strict=True):
        assert_same(got[name], expected)


def assert_grids_fit(launches):
    assert launches
    for launch in launches:
        x, *others = launch.grid
        assert x < 2**31
        assert all(each <= 65_535 for each in others), (launch.kernel.__name__, launch.grid)


@pytest.mark.parametrize(("batch", "height", "width"), [(2, 256, 257), (5_000_000, 3, 3)])
def test_grids_of_huge_convolutions_are_possible(batch, height, width):
    conv, geometry = convs.make(GEOMETRIES["3x3"], 4, 1, (3, 3), 1.0), GEOMETRIES["3x3"]
    indices = conv.pattern.crow_indices, conv.pattern.col_indices
    plan = gpu.Plan(gpu.conv_plan(*indices, geometry).words.to("meta"), (1, 1))
    indices, values = [each.to("meta") for each in indices], conv.values.to("meta")
    x, gy = (torch.empty(batch, channels, height, width, device="meta") for channels in (3, 4))
    with recorded() as launches:
        y, winners = gpu.conv_forward(x, values, None, *indices, plan, geometry, True, 1)
        gpu.conv_backward(gy, x, y, winners, values, *indices, plan, geometry, True, 1, True, True, True)
    assert_grids_fit(launches)


def test_grids_of_huge_batches_are_possible():
    chain = make(1, [40, 30], 0.5)
    (pattern,) = chain.patterns
    plan = gpu.Plan(gpu.plan(pattern.crow_indices, pattern.col_indices, 40).words.to("meta"), (1, 1))
    indices = [pattern.crow_indices.to("meta")], [pattern.col_indices.to("meta")], [plan]
    x, gy = torch.empty(5_000_000, 40, device="meta"), torch.empty(5_000_000, 30, device="meta")
    with assumed((9, 0), 227 << 10), recorded() as launches:
        _, saved = gpu.chain_forward(x, [chain.values[0].to("meta")], [None], *indices, False, True)
        gpu.chain_backward(gy, x, saved, [chain.values[0].to("meta")], *indices, True, [True], [True])
    assert_grids_fit(launches)


@pytest.mark.gpu_core
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
    words = csr_plan.build(pattern.crow_indices, pattern.col_indices, 4)
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
    assert not rows[:, 5 : layout.whole_lanes(5)].any()
    back = torch.empty_like(images)
    layout.unpack(rows, back)
    assert torch.equal(back, images)


@pytest.mark.skipif(DEVICE != "cpu", reason="the memory is only promised")
def test_offsets_within_images_pass_2_to_the_31():
    margin, step = 256, 2**31 - 64  # twice of it is -128 in 32 bits, which lies in the margin
    memory = torch.from_numpy(np.zeros(2 * margin + 2 * step, np.float16))
    images = memory.as_strided((1, 2, 2, 1), (1, step, step, 1), margin)
    images[0, 1, 1, 0] = 3
    assert layout.pack(images, layout.Placing(2, 1))[:, 0].tolist() == [0, 0, 0, 3]


def test_a_tile_has_no_more_samples_than_there_are():
    with (
        overridden("spmm", bn=32),
        pytest.raises(ValueError, match=r"bn: expected at most 16, .* of 3 samples, got 32"),
    ):
        run_conv(convs.make(GEOMETRIES["1x1"], 4, 3, (2, 2), 0.5))


@pytest.mark.parametrize("of", [{"bf": 32, "bn": 16, "warps": 1}, {"bf": 8, "bn": 128, "warps": 2}])
def test_other_launch_shapes_of_a_layout(of):
    images = torch.randn(37, 3, 4, 6, device=DEVICE)
    with overridden("layout", **of):
        rows, back = layout.pack(images, layout.Placing(4, 6)), torch.empty_like(images)
        layout.unpack(rows, back)
        with recorded() as launches:
            layout.unpack(rows, back)
    assert torch.equal(back, images)
    (launch,) = launches
    assert [*map(launch.arguments.get, ("BF", "BN")), launch.options["num_warps"]] == list(of.values())


@pytest.mark.parametrize("nnz", range(6))
def test_parts_of_a_plan_start_at_multiples_of_16_bytes(nnz):
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask.view(-1)[:nnz] = True
    (pattern,) = of_masks(1, [mask]).patterns
    parts = csr_plan.sections(csr_plan.build(pattern.crow_indices, pattern.col_indices, 7), 5, 7, nnz)
    assert [part.numel() for part in parts] == [5, 7, 8, nnz, nnz, nnz]
    assert [part.data_ptr() % 16 for part in parts] == [0] * 6


def test_dtypes_and_plans_that_are_not_supported_are_refused():
    plan = gpu.Plan(torch.zeros(4, dtype=torch.int32), (1, 1))
    assert gpu.supports(torch.float32, [plan])
    assert not gpu.supports(torch.float64, [plan])
    assert not gpu.supports(torch.float32, [plan, gpu.Plan(plan.words[:0], (1, 1))])
