"""Single weights times up to 64 samples: on the GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from canaries import Canaries
from chains import assert_accurate, assert_exact, dense, make, of_masks
from gpus import DEVICE, DTYPES, on_cpu, run_chain

from sparselottery.kernels import gpu, reference
from sparselottery.kernels.gpu import csr
from sparselottery.kernels.gpu.csr import narrow
from sparselottery.kernels.gpu.csr import plan as csr_plan
from sparselottery.kernels.gpu.launch import overridden, recorded

pytestmark = pytest.mark.usefixtures("poison")

BATCHES = [1, 2, 15, 16, 17, 31, 33, 47, 64]


def gaussian(*shape):
    return torch.randn(shape)


def compiled(chain):
    """crow_indices, col_indices and plans, on DEVICE."""
    indices = [(p.crow_indices.to(DEVICE), p.col_indices.to(DEVICE)) for p in chain.patterns]
    plans = [gpu.plan(*index, mask.shape[1]) for index, mask in zip(indices, chain.masks, strict=True)]
    return *map(list, zip(*indices, strict=True)), plans


def forward(chain, minor_x, minor_y, relu=False):
    """y of a chain of one layer by csr.forward, in guarded memory; of a batch-minor y the whole rows are checked."""
    (crow_indices,), (col_indices,), (plan,) = compiled(chain)
    (batch, _), canaries = chain.x.shape, Canaries(DEVICE)
    ld, features = reference.leading_dim(batch), len(chain.masks[0])
    x = canaries.rows(chain.x, ld) if minor_x else canaries.copy(chain.x)
    values, bias = canaries.copy(chain.values[0]), chain.biases[0]
    bias = None if bias is None else canaries.copy(bias)
    y = canaries.empty(batch, features, dtype=chain.x.dtype)
    if minor_y:
        rows = canaries.empty(features, ld, dtype=chain.x.dtype)
        y = rows[:, :batch].t()
    csr.forward(x, values, bias, crow_indices, col_indices, plan, y, relu)
    canaries.check()
    assert not minor_y or not rows[:, batch:].any()
    return y.cpu()


def launches(chain, save=False, batch_minor=False):
    """What chain_forward starts, as (name, arguments)."""
    with recorded() as found:
        x, *values = [t.to(DEVICE) for t in (chain.x, *chain.values)]
        gpu.chain_forward(x, values, [b.to(DEVICE) for b in chain.biases], *compiled(chain), batch_minor, save)
    return [(each.kernel.__name__, each.arguments) for each in found]


@pytest.mark.parametrize("minor_y", [False, True])
@pytest.mark.parametrize("batch", BATCHES)
def test_equals_the_truth(batch, minor_y):
    chain = make(batch, [70, 13], 0.4, bias=batch % 2 == 0)
    for minor_x in {True, batch > 1}:
        assert_exact({"y": forward(chain, minor_x, minor_y)}, chain)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_neighbours_of_16_bits_are_kept_apart(dtype):
    """Small integers and their sums are exact in 16 bits: one sample's bits in another's would show."""
    chain = make(16, [20, 9], 0.5)
    assert_exact({"y": forward(chain.to(dtype), True, False)}, chain)


def test_the_single_sample_in_both_layouts():
    chain = make(1, [40, 9], 0.4)
    y = forward(chain, False, False)
    assert_exact({"y": y}, chain)
    assert torch.equal(y, forward(chain, True, True))


@pytest.mark.parametrize("batch", [1, 5, 40])
def test_ragged_masks(batch):
    mask = torch.zeros(11, 700, dtype=torch.bool)
    mask[1], mask[4, 3], mask[:9, 7], mask[6, ::2] = True, True, True, True  # a full row; two rows are empty
    chain = of_masks(batch, [mask])
    assert_exact({"y": forward(chain, batch > 1, False)}, chain)
    nothing = of_masks(batch, [torch.zeros(5, 6, dtype=torch.bool)])
    assert_exact({"y": forward(nothing, batch > 1, True)}, nothing)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("extra", "narrow"), [(0, True), (9, False)])
def test_columns_of_16_bits_and_of_more(extra, narrow, batch):
    in_features = csr_plan.MAX_NARROW + extra
    mask = torch.zeros(2, in_features, dtype=torch.bool)
    mask[0, [0, 255, 256, 32767, 32768, 65535, in_features - 1]], mask[1, :3] = True, True
    chain = of_masks(batch, [mask])
    (pattern,), (plan,) = chain.patterns, compiled(chain)[2]
    sections = csr_plan.sections(plan.words, 2, in_features, pattern.nnz)
    assert bool(sections.narrow.numel()) == narrow
    assert_exact({"y": forward(chain, batch > 1, False)}, chain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 16, 40])
def test_is_as_accurate_as_torch(batch, dtype):
    chain = make(batch, [300, 10], 0.4, entries=gaussian).to(dtype)
    y = forward(chain, batch > 1, False)
    assert y.dtype == dtype
    assert_accurate({**dense(chain), "y": y}, chain)  # of y alone: the gradients are torch's own


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 4])
def test_nan_and_infinity_go_where_weights_read_them(batch, dtype):
    mask = torch.zeros(4, 80, dtype=torch.bool)
    mask[0, 3], mask[1, 4], mask[2, :70], mask[3, 5:] = True, True, True, True
    chain = of_masks(batch, [mask])
    chain.values[0].fill_(-1)
    chain.x[0, 3], chain.x[-1, 4], chain.x[:, 79] = math.nan, math.inf, -math.inf
    chain = chain.to(dtype)
    x, bias = chain.x.float(), chain.biases[0].float()
    expected = torch.stack([bias[row] - x[:, kept].sum(1) for row, kept in enumerate(mask)], 1)
    for relu in (False, True):
        y = forward(chain, batch > 1, relu, relu).float()
        torch.testing.assert_close(y, torch.relu(expected) if relu else expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("of", [{"rows": 2, "split": 4, "unroll": 2}, {"rows": 8, "split": 1, "unroll": 1}])
@pytest.mark.parametrize("batch", [1, 20])
def test_other_launch_shapes(batch, of):
    chain = make(batch, [600, 7], 0.5)
    with overridden("spmm_narrow", **of):
        assert_exact({"y": forward(chain, batch > 1, False)}, chain)


def test_few_long_rows_are_split_among_warps():
    assert narrow.shape(11008, 4_508_876, 1, 2) == narrow.Shape(1, 1, 8)
    assert narrow.shape(10, 655_360, 1, 2) == narrow.Shape(1, 16, 8)
    assert narrow.shape(10, 100, 16, 4) == narrow.Shape(4, 1, 4)
    chain = make(2, [3000, 3], 0.9)
    ((_, arguments),) = launches(chain)[1:]
    assert arguments["BK"] == 16 * narrow.lanes(16, 4)
    assert_exact({"y": forward(chain, True, False)}, chain)


@pytest.mark.parametrize("batch_minor", [False, True])
@pytest.mark.parametrize("batch", [1, 6, 64])
def test_a_chain_and_its_gradients(batch, batch_minor):
    chain = make(batch, [20, 33, 17, 5], 0.3)
    assert_exact(run_chain(chain, batch_minor=batch_minor), chain)


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("batch", [1, 5])
def test_relu_keeps_nan(batch, save):
    chain = make(batch, [6, 5, 4], 1.0)
    chain.x[0, 2] = math.nan
    x, *values = [t.to(DEVICE) for t in (chain.x, *chain.values)]
    y, _ = gpu.chain_forward(x, values, [b.to(DEVICE) for b in chain.biases], *compiled(chain), False, save)
    assert y[0].isnan().all()
    assert not y[1:].isnan().any()


@pytest.mark.parametrize("batch", [1, 5, 16])
def test_strided_inputs(batch):
    chain = make(batch, [12, 9, 4], 0.5)
    wide = torch.full((2 * batch, 3 * 12), math.nan)
    wide[::2, ::3] = chain.x
    other = type(chain)(**{**vars(chain), "x": wide[::2, ::3]})
    assert_exact(run_chain(other), chain)


def test_one_launch_a_layer_and_one_for_the_transpose():
    one, many = make(1, [20, 30, 10], 0.5), make(9, [20, 30, 10], 0.5)
    assert [name for name, _ in launches(one)] == 2 * ["_spmm_narrow_kernel"]
    assert [name for name, _ in launches(many)] == ["_layout_kernel", *2 * ["_spmm_narrow_kernel"]]
    (_, first), (_, second) = launches(one)
    assert (first["LD"], second["LD"]) == (1, 1)
    assert first["y"].data_ptr() == second["x"].data_ptr()
    (_, first), (_, second) = launches(many)[1:]
    assert first["y"].data_ptr() == second["x"].data_ptr()
    assert "_spmm_narrow_kernel" not in [name for name, _ in launches(make(narrow.NARROW + 1, [20, 10], 0.5))]


@pytest.mark.parametrize("batch", BATCHES)
def test_samples_that_are_not_there_are_not_read(batch):
    for name, arguments in launches(make(batch, [20, 30, 10], 0.5), save=True):
        if name == "_spmm_narrow_kernel":
            assert arguments["columns"] <= arguments["LD"]
            assert arguments["RAGGED"] == (arguments["columns"] < arguments["NB"])


def test_a_view_that_starts_anywhere():
    """16 bytes at a time are read from multiples of 16 bytes only."""
    chain = make(16, [12, 7], 0.5)
    rows = torch.full((12, 32), math.nan)
    rows[:, 1:17] = chain.x.t()
    view = type(chain)(**{**vars(chain), "x": rows[:, 1:17].t()})
    assert reference.is_packed(view.x)
    assert view.x.data_ptr() % 16
    ((_, arguments),) = launches(view)
    assert arguments["x"].data_ptr() % 16 == 0


@pytest.mark.parametrize("batch", [5, 16, 33])
def test_rows_that_start_anywhere(batch):
    """They are read whole vectors of samples at a time, also where only some of these samples are there."""
    chain = make(batch, [12, 7], 0.5)
    rows = torch.zeros(12, 64, device=DEVICE)
    rows[:, 1 : 1 + batch] = chain.x.t()
    operands = [t.to(DEVICE) for t in (chain.values[0], chain.biases[0])]
    (crow_indices,), (col_indices,), (plan,) = compiled(chain)
    x, y = rows[:, 1 : 1 + batch].t(), torch.empty(batch, 7, device=DEVICE)
    csr.forward(x, *operands, crow_indices, col_indices, plan, y)
    assert_exact(on_cpu({"y": y}), chain)
    with recorded() as found:
        csr.forward(x, *operands, crow_indices, col_indices, plan, y)
    (arguments,) = [each.arguments for each in found]
    assert arguments["x"].data_ptr() % 16 == 0
    assert arguments["LD"] % reference.LANES == 0
    assert arguments["columns"] <= arguments["LD"]
