"""The native kernels, and the reference beside them, against dense fp64: raw tensors, no package around."""

from __future__ import annotations

import gc
import itertools
import math
import sys
from dataclasses import replace

import pytest
import torch
from chains import Chain, assert_accurate, assert_exact, integers, make, of_masks, run, spy, truth

from sparselottery.kernels import backends, cpu, native, reference

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(not cpu.available(), reason=cpu.status()),
]
DTYPES = [torch.float32, torch.float64]
BATCHES = [1, 2, 15, 16, 17, 60, 128, 129, 240, 256, 300]
FEATURES = [1, 7, 16, 100, 1000]
LIGHT, HEAVY = ([300, 100, 10], 0.05), ([300, 400, 10], 0.9)  # is_light in csrc/pack.h
BACKENDS = pytest.mark.parametrize("backend", [cpu, reference], ids=["cpu", "reference"])

MASKS = {
    "empty": lambda mask: mask.zero_(),
    "full": lambda mask: mask.fill_(True),
    "one empty row": lambda mask: mask.fill_(True)[3].fill_(False),
    "one empty column": lambda mask: mask.fill_(True)[:, 5].fill_(False),
    "one full row": lambda mask: mask.zero_()[3].fill_(True),
    "one full column": lambda mask: mask.zero_()[:, 5].fill_(True),
    "all but one": lambda mask: mask.fill_(True)[-1, -1].fill_(False),
    "the last one": lambda mask: mask.zero_()[-1, -1].fill_(True),
    "diagonal": lambda mask: mask.zero_().fill_diagonal_(True),
}


def test_a_plan_lies_in_the_memory_that_was_built_for_it(monkeypatch):
    """It is held until the last tensor of it is gone."""
    made = []
    spy(monkeypatch, "plan", lambda build, *args: made.append(build(*args)) or made[0])
    crow_indices, col_indices = torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([0, 4, 1], dtype=torch.int32)
    plan = cpu.plan(crow_indices, col_indices, 5)
    address, part = plan.data_ptr(), plan[3:]
    assert address % 64 == 0
    assert address == torch.frombuffer(made[0], dtype=torch.int32).data_ptr()
    holders = references(made)
    del plan
    gc.collect()
    assert references(made) == holders
    del part
    gc.collect()
    assert references(made) == holders - 1


def references(made):
    return sys.getrefcount(made[0])  # outside of an assert, which holds what it shows


def gaussian(*shape):
    return torch.randn(shape)


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
def test_batch_sizes(backend, batch, dtype):
    chain = make(batch, [100, 60, 7]).to(dtype)
    assert_exact(run(backend, chain), chain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), list(itertools.product(FEATURES, FEATURES)))
def test_accuracy_at_ragged_features(inputs, outputs, dtype):
    chain = make(17, [inputs, outputs], entries=gaussian).to(dtype)
    assert_accurate(run(cpu, chain), chain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 60, 300])
def test_accuracy_at_density_one(batch, dtype):
    chain = make(batch, [300, 100], density=1.0, entries=gaussian).to(dtype)
    assert_accurate(run(cpu, chain), chain)


@BACKENDS
@pytest.mark.parametrize("batch", [1, 60])
@pytest.mark.parametrize("name", MASKS)
def test_masks(backend, name, batch):
    mask = torch.empty(40, 33, dtype=torch.bool)
    MASKS[name](mask)
    for dtype in DTYPES:
        for masks in ([mask], [mask, torch.rand(10, 40) < 0.3]):
            chain = of_masks(batch, masks).to(dtype)
            assert_exact(run(backend, chain), chain)


@BACKENDS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_depth(backend, depth, bias):
    for batch in (1, 17, 60):
        chain = make(batch, [40, 30, 50, 20, 10][: depth + 1], bias=bias)
        assert_exact(run(backend, chain), chain)


def is_nothing(gradient):
    return gradient is None or gradient.numel() == 0


@BACKENDS
@pytest.mark.parametrize("depth", [1, 2])
def test_only_the_needed_gradients(backend, depth):
    chain = make(60, [30, 20, 10][: depth + 1])
    indices = chain.indices()
    _, saved = backend.chain_forward(chain.x, chain.values, chain.biases, *indices, False, True)
    expected = truth(chain)
    for need_x, *needs in itertools.product([True, False], repeat=1 + 2 * depth):
        needs = needs[:depth], needs[depth:]
        gx, *grads = backend.chain_backward(chain.gy, chain.x, saved, chain.values, *indices, need_x, *needs)
        assert torch.equal(gx.double(), expected["gx"]) if need_x else is_nothing(gx)
        for name, got, need in zip(["gvalues", "gbias"], grads, needs, strict=True):
            for layer in range(depth):
                want = expected[f"{name} {layer}"]
                assert torch.equal(got[layer].double(), want) if need[layer] else is_nothing(got[layer])


def packed(x, ld):
    """x with strides (1, ld); what lies between its columns is NaN."""
    memory = torch.full((x.shape[1], ld), math.nan, dtype=x.dtype)
    memory[:, : len(x)] = x.t()
    return memory[:, : len(x)].t()


def spaced(x):
    return torch.stack([x, torch.full_like(x, math.nan)], 2).flatten(1)


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "a slice of columns": lambda x: spaced(x)[:, : x.shape[1]].copy_(x),
    "every other row": lambda x: torch.stack([x, x * math.nan], 1)[:, 0],
    "every other column": lambda x: spaced(x)[:, ::2],
    "batch-minor, padded": lambda x: packed(x, reference.leading_dim(len(x))),
    "batch-minor, padded more": lambda x: packed(x, reference.leading_dim(len(x)) + 48),
    "batch-minor, unaligned": lambda x: packed(x, len(x) + 3),
}


@BACKENDS
@pytest.mark.parametrize("batch", [1, 2, 16, 17, 256])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_inputs(backend, layout, batch):
    for dtype, widths in itertools.product(DTYPES, ([30, 20], [30, 20, 10])):
        plain = make(batch, widths).to(dtype)
        arrange = LAYOUTS[layout]
        x, gy = arrange(plain.x), arrange(plain.gy)
        assert torch.equal(x, plain.x)
        assert torch.equal(gy, plain.gy)
        for chain in (replace(plain, x=x), replace(plain, gy=gy), replace(plain, x=x, gy=gy)):
            got = run(backend, chain)
            assert_exact(got, plain)
            packs = reference.is_packed(chain.x)
            assert got["gx"].stride() == ((1, reference.leading_dim(batch)) if packs else (30, 1))
        y, _ = backend.chain_forward(x, plain.values, plain.biases, *plain.indices(), False, False)
        assert torch.equal(y.double(), truth(plain)["y"])


@BACKENDS
def test_expanded_inputs(backend):
    plain = make(17, [30, 20])
    rows, whole = plain.x[:1].expand(17, 30), plain.gy[:1, :1].expand(17, 20)
    columns = plain.x[:, :1].expand(17, 30)
    for chain in (replace(plain, x=rows), replace(plain, x=columns), replace(plain, gy=whole)):
        assert_exact(run(backend, chain), chain)


@BACKENDS
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 17, 256])
def test_batch_minor_results(backend, batch, dtype, save):
    chain = make(batch, [20, 10]).to(dtype)
    y, _ = backend.chain_forward(chain.x, chain.values, chain.biases, *chain.indices(), True, save)
    assert y.stride() == (1, reference.leading_dim(batch))
    assert torch.equal(y.double(), truth(chain)["y"].to(dtype).double())


@pytest.mark.parametrize("batch", [1, 17, 300])
@pytest.mark.parametrize("tile", [(1, 1), (3, 5), (16, 7), (256, 80), (4096, 4096)])
def test_tiles_change_nothing(tile, batch):
    for dtype in DTYPES:
        chain = make(batch, [100, 60, 7], density=0.2).to(dtype)
        assert_exact(run(cpu, chain, tile), chain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2, 17, 60, 129, 300])
def test_levels_agree(level, batch, dtype):
    chain = make(batch, [100, 61, 7], density=0.2).to(dtype)
    assert_exact(run(cpu, chain), chain)
    y, _ = cpu.chain_forward(chain.x, chain.values, chain.biases, *chain.indices(), False, False)
    assert torch.equal(y.double(), truth(chain)["y"])
    noise = make(batch, [100, 61], density=0.2, entries=gaussian).to(dtype)
    assert_accurate(run(cpu, noise), noise)


@pytest.mark.parametrize("batch", [1, 17])
def test_strided_values_and_biases(batch):
    chain = make(batch, [60, 30, 7], density=0.2)
    strided = [[each.repeat_interleave(2)[::2] for each in tensors] for tensors in (chain.values, chain.biases)]
    y, _ = cpu.chain_forward(chain.x, *strided, *chain.indices(), False, True)
    assert torch.equal(y, cpu.chain_forward(chain.x, chain.values, chain.biases, *chain.indices(), False, True)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("widths", "density"), [LIGHT, HEAVY])
@pytest.mark.parametrize("batch", [1, 16, 17, 48, 60, 80, 129, 144, 256, 300, 384, 650])
def test_threads_change_no_bit(level, batch, widths, density, dtype):
    """What a thread takes, a tile of the batch or strips of W, depends on the threads, and no sum may depend on it."""
    chain = make(batch, widths, density=density, entries=gaussian).to(dtype)
    torch.set_num_threads(1)
    alone = run(cpu, chain)
    for threads in (2, 3, 4, 5):
        torch.set_num_threads(threads)
        for name, result in run(cpu, chain).items():
            assert torch.equal(result, alone[name]), (threads, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("widths", "density"), [LIGHT, HEAVY])
@pytest.mark.parametrize("batch", [5, 60, 128, 200, 256, 300, 384, 650])
def test_inference_gives_the_bits_of_training(level, batch, widths, density, dtype):
    """Its tiles of the batch may be others, with any number of threads."""
    chain = make(batch, widths, density=density, entries=gaussian).to(dtype)
    args = chain.x, chain.values, chain.biases, *chain.indices(), False
    trained, _ = cpu.chain_forward(*args, True)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(cpu.chain_forward(*args, False)[0], trained)


@pytest.mark.parametrize(("widths", "density"), [LIGHT, HEAVY])
@pytest.mark.parametrize("batch", [5, 60, 112, 128, 300])
def test_what_is_saved_gives_the_input_back(level, batch, widths, density):
    chain = make(batch, widths, density=density, entries=gaussian)
    _, saved = cpu.chain_forward(chain.x, chain.values, chain.biases, *chain.indices(), False, True)
    assert torch.equal(cpu.saved_input(saved, batch, widths[0], *chain.indices()[:2]), chain.x)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("batch", [330, 700, 1111])
def test_inference_in_the_same_memory_tile_after_tile(batch, dtype):
    """What nobody keeps of a tile, the next one of the same thread overwrites, and no other's."""
    chain = make(batch, [600, 400, 7], density=0.3 if dtype != torch.bfloat16 else 0.01).to(dtype)
    expected = truth(chain)["y"].to(dtype)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for batch_minor in (False, True):
            args = chain.x, chain.values, chain.biases, *chain.indices(), batch_minor, False
            assert torch.equal(cpu.chain_forward(*args)[0], expected)


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("batch", [1, 17])
def test_what_is_not_finite_passes_as_in_torch_and_stays_on_its_path(batch, bad, save):
    x, identity = integers(batch, 8), torch.eye(8, dtype=torch.bool)
    x[-1, 3] = bad
    chain = Chain(x, x, [identity] * 2, [torch.ones(8)] * 2, [None, None])
    y, _ = cpu.chain_forward(chain.x, chain.values, chain.biases, *chain.indices(), False, save)
    assert torch.equal(y.nan_to_num(123), torch.relu(chain.x).nan_to_num(123))


@BACKENDS
def test_nothing_is_written_to_the_inputs(backend):
    chain = make(17, [30, 20, 10])
    tensors = [chain.x, chain.gy, *chain.values, *chain.biases]
    before = [t.clone() for t in tensors]
    run(backend, chain)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def test_packing():
    for batch in (0, *BATCHES):
        ld = reference.leading_dim(batch)
        assert ld >= batch
        assert ld % reference.LANES == 0
        x = integers(batch, 3)
        assert torch.equal(reference.unpack(reference.pack(x), batch), x)
        assert not reference.pack(x)[:, batch:].any()


def test_a_tall_pattern_of_one_column_and_its_transpose():
    for widths in ([1, 70_000], [70_000, 1]):
        chain = make(3, widths, density=0.001)
        assert_exact(run(cpu, chain), chain)


def test_unsupported_dtypes_are_not_claimed():
    plans = make(1, [2, 2]).indices()[2]
    assert cpu.supports(torch.float32, plans)
    assert not cpu.supports(torch.complex64, plans)
    assert not cpu.supports(torch.float32, [*plans, plans[0][:0]])


def test_status_says_what_runs_or_why_not(monkeypatch, tmp_path):
    assert backends()["cpu"] == cpu.status()
    assert cpu.status().startswith("native, ")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    library, why = native._best()
    assert library is None
    assert "no native library was built" in why
    (tmp_path / "_native_base.so").write_bytes(b"not a library")
    library, why = native._best()
    assert library is None
    assert "_native_base.so does not load" in why
