import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.sparse
import torch
from blocks import blocky, is_blocky
from hypothesis import given, settings

from sparselottery import Pattern
from sparselottery.kernels import native as native_library
from sparselottery.pattern import BLOCKS, block_of, has_blocks

MASK = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]], dtype=torch.bool)
masks = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=9)).map(torch.from_numpy)


def int32(*items):
    return torch.tensor(items, dtype=torch.int32)


def test_the_miniature_of_the_docstring():
    pattern = Pattern.from_mask(MASK)
    assert torch.equal(pattern.crow_indices, int32(0, 2, 2, 4))
    assert torch.equal(pattern.col_indices, int32(0, 3, 1, 2))
    assert pattern.crow_indices.dtype == pattern.col_indices.dtype == torch.int32
    assert (pattern.shape, pattern.nnz, pattern.density) == ((3, 4), 4, 4 / 12)
    assert pattern.row_indices().tolist() == [0, 0, 2, 2]
    values = torch.tensor([1.0, 2, 3, 4])
    assert pattern.scatter(values).tolist() == [[1, 0, 0, 2], [0, 0, 0, 0], [0, 3, 4, 0]]
    assert pattern.validate() is pattern


@given(masks)
def test_is_the_csr_of_scipy(mask):
    pattern, csr = Pattern.from_mask(mask), scipy.sparse.csr_matrix(mask.numpy())
    np.testing.assert_array_equal(pattern.crow_indices, csr.indptr)
    np.testing.assert_array_equal(pattern.col_indices, csr.indices)
    assert pattern.validate().nnz == csr.nnz
    assert torch.equal(pattern.mask(), mask)
    assert pattern.density == (csr.nnz / mask.numel() if mask.numel() else 0)


@given(masks, st.randoms(use_true_random=False))
def test_gather_inverts_scatter(mask, random):
    pattern = Pattern.from_mask(mask)
    values = torch.tensor([random.random() for _ in range(pattern.nnz)], dtype=torch.float64)
    dense = pattern.scatter(values)
    assert dense.dtype == values.dtype
    assert torch.equal(pattern.gather(dense), values)
    assert torch.equal(dense[~mask], torch.zeros_like(dense[~mask]))


@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded"])
def test_masks_of_any_strides(layout):
    mask = {
        "strided": torch.stack([MASK, ~MASK], 2)[..., 0],
        "transposed": MASK.t(),
        "expanded": MASK[0].expand(5, 4),
    }[layout]
    assert not mask.is_contiguous()
    assert torch.equal(Pattern.from_mask(mask).mask(), mask)


def test_is_differentiable_both_ways():
    pattern = Pattern.from_mask(MASK)
    values = torch.randn(4, dtype=torch.float64, requires_grad=True)
    dense = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pattern.scatter, values)
    assert torch.autograd.gradcheck(pattern.gather, dense)


@pytest.mark.parametrize("mask", [MASK.float(), MASK.int(), MASK.to(torch.uint8)])
def test_a_mask_is_bool(mask):
    with pytest.raises(TypeError, match=f"mask: expected a bool tensor, got {mask.dtype}"):
        Pattern.from_mask(mask)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4)])
def test_a_mask_is_a_matrix(shape):
    with pytest.raises(ValueError, match="mask: expected shape"):
        Pattern.from_mask(torch.ones(shape, dtype=torch.bool))


def test_more_columns_than_int32_counts_are_refused():
    with pytest.raises(ValueError, match=f"at most {2**31 - 1}"):
        Pattern.from_mask(torch.zeros(0, 1, dtype=torch.bool).expand(0, 2**31))


@pytest.mark.parametrize(
    ("crow_indices", "col_indices", "message"),
    [
        (int32(0, 2, 2, 4).long(), int32(0, 3, 1, 2), "crow_indices: expected a 1-D int32 tensor, got torch.int64"),
        (int32(0, 2, 2, 4), torch.tensor([0.0, 3, 1, 2]), "col_indices: expected a 1-D int32 tensor, got torch.float"),
        (int32(0, 2, 2, 4)[None], int32(0, 3, 1, 2), "crow_indices: expected a 1-D"),
        (int32(0, 2, 4), int32(0, 3, 1, 2), "crow_indices: expected length 4, got 3"),
        (int32(), int32(), "crow_indices: expected length 4, got 0"),
        (int32(1, 2, 2, 4), int32(0, 3, 1, 2), "from 0 to nnz = 4, got 1 to 4"),
        (int32(0, 2, 2, 5), int32(0, 3, 1, 2), "from 0 to nnz = 4, got 0 to 5"),
        (int32(0, 3, 2, 4), int32(0, 3, 1, 2), "crow_indices: expected a non-decreasing"),
        (int32(0, 5, 2, 4), int32(0, 3, 1, 2), "crow_indices: expected a non-decreasing"),
        (int32(0, 2, 2, 4), int32(0, 4, 1, 2), r"col_indices: expected values in \[0, 4\), got 0 to 4"),
        (int32(0, 2, 2, 4), int32(0, 3, -1, 2), r"col_indices: expected values in \[0, 4\), got -1 to 3"),
        (int32(0, 2, 2, 4), int32(3, 0, 1, 2), "col_indices: expected strictly ascending"),
        (int32(0, 2, 2, 4), int32(0, 3, 1, 1), "col_indices: expected strictly ascending"),
    ],
)
def test_validate_names_what_is_wrong(crow_indices, col_indices, message):
    with pytest.raises(ValueError, match=message):
        Pattern(crow_indices, col_indices, (3, 4)).validate()


@given(masks, st.data())
def test_validate_accepts_only_patterns_of_masks(mask, data):
    """Any one changed index either gives the pattern of another mask or is refused."""
    pattern = Pattern.from_mask(mask)
    name = data.draw(st.sampled_from(["crow_indices", "col_indices"]))
    tensors = {"crow_indices": pattern.crow_indices.clone(), "col_indices": pattern.col_indices.clone()}
    if not len(tensors[name]):
        return
    tensors[name][data.draw(st.integers(0, len(tensors[name]) - 1))] += data.draw(st.integers(-3, 3))
    changed = Pattern(**tensors, shape=pattern.shape)
    try:
        changed.validate()
    except ValueError:
        return
    again = Pattern.from_mask(changed.mask())
    assert torch.equal(again.crow_indices, changed.crow_indices)
    assert torch.equal(again.col_indices, changed.col_indices)


@pytest.mark.parametrize("shape", [(4, 3), (3,), (3, 4, 1)])
def test_gather_takes_its_own_shape(shape):
    with pytest.raises(ValueError, match=r"dense: expected shape \(3, 4\), got"):
        Pattern.from_mask(MASK).gather(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(3,), (5,), (4, 1), ()])
def test_scatter_takes_nnz_values(shape):
    with pytest.raises(ValueError, match=r"values: expected shape \(4,\), got"):
        Pattern.from_mask(MASK).scatter(torch.zeros(shape))


# blocks


def compiled(mask):
    return Pattern.from_mask(mask.flatten(1))


@settings(deadline=None)
@given(
    hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=9),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.integers(0, 99),
    st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    st.data(),
)
def test_has_blocks_is_its_definition(shape, made_of, asked, seed, density, data):
    mask = blocky(shape, made_of, seed, density)
    assert has_blocks(compiled(mask), shape, made_of)
    assert has_blocks(compiled(mask), shape, asked) == is_blocky(mask, asked)
    flipped = mask.flatten().clone()
    flipped[data.draw(st.integers(0, mask.numel() - 1))] ^= True
    for block in (made_of, asked):
        assert has_blocks(compiled(flipped.view(shape)), shape, block) == is_blocky(flipped.view(shape), block)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([*BLOCKS, (4, 4), (8, 1), (1, 16), (1, 1)]),
    st.sampled_from([(130, 70), (64, 64), (257, 40), (5, 90), (96, 20, 3, 1), (128, 16, 1, 1), (40, 65, 2, 2)]),
    st.integers(0, 99),
)
def test_the_block_is_the_first_that_the_mask_consists_of(made_of, shape, seed):
    mask = blocky(shape, made_of, seed)
    assert block_of(compiled(mask), shape) == next((block for block in BLOCKS if is_blocky(mask, block)), (1, 1))


@pytest.mark.parametrize("block", BLOCKS)
def test_the_block_of_a_matrix_and_of_a_convolution(block):
    assert compiled(blocky((300, 150), block)).block == block
    shape = (300, 150, 3, 2)
    pattern = compiled(blocky(shape, block))
    assert block_of(pattern, shape) == block
    column = block[0], 1  # in the matrix the channels are taps apart
    assert pattern.block == (column if column in BLOCKS else (1, 1))


def test_blocks_of_a_convolution_lie_at_one_tap():
    mask = torch.zeros(16, 16, 3, 3, dtype=torch.bool)
    mask[..., 1, 2] = True
    assert block_of(compiled(mask), mask.shape) == (128, 128)
    assert block_of(compiled(mask), (16, 144)) == (128, 1)
    whole_rows = torch.zeros(128, 144, dtype=torch.bool)
    whole_rows[:64] = True
    assert block_of(compiled(whole_rows), (128, 16, 3, 3)) == block_of(compiled(whole_rows), (128, 144)) == (64, 64)


def test_an_empty_and_a_whole_mask_are_of_any_block():
    for mask in (torch.zeros(7, 9, dtype=torch.bool), torch.ones(7, 9, dtype=torch.bool)):
        assert compiled(mask).block == BLOCKS[0]
    assert compiled(torch.zeros(0, 5, dtype=torch.bool)).block == compiled(torch.zeros(5, 0) > 0).block == BLOCKS[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.rand(256, 256) < 0.1,
        lambda: torch.zeros(256, 256).scatter(1, torch.rand(256, 256).argsort(1)[:, :32], 1) > 0,  # rows equally long
        lambda: torch.cat([blocky((128, 256), (128, 128)), torch.rand(128, 256) < 0.5]),
        lambda: torch.eye(256) > 0,
        lambda: torch.ones(256, 256).tril() > 0,
    ],
)
def test_masks_without_blocks(make):
    assert compiled(make()).block == (1, 1)


def test_blocks_after_empty_rows():
    mask = torch.zeros(80, 64, dtype=torch.bool)
    mask[48:64, 16:32] = True
    assert compiled(mask).block == (16, 16)
    mask[63, 20] = False
    assert compiled(mask).block == (1, 1)


def test_the_shape_is_the_weights():
    with pytest.raises(ValueError, match=r"shape: expected that of a weight with the matrix \(3, 4\), got \(3, 2, 3\)"):
        block_of(Pattern.from_mask(MASK), (3, 2, 3))


@given(masks)
def test_the_pattern_of_the_transposed_matrix(mask):
    pattern = Pattern.from_mask(mask)
    transposed, order = pattern.transposed()
    assert torch.equal(transposed.validate().mask(), mask.t())
    values = torch.arange(pattern.nnz)
    assert torch.equal(transposed.scatter(values[order]), pattern.scatter(values).t())


def test_a_mask_of_one_false_for_all_is_not_written_out():
    mask = torch.zeros(1, dtype=torch.bool).expand(2**15, 2**15)  # a gigabyte
    pattern, values = Pattern.of_survivors(mask, torch.zeros(1).expand(2**15, 2**15))
    assert (pattern.nnz, len(values)) == (0, 0)
    assert pattern.validate().shape == (2**15, 2**15)
    whole = Pattern.from_mask(torch.ones(1, dtype=torch.bool).expand(3, 4))
    assert whole.nnz == 12


@pytest.mark.parametrize("shape", [(5, 7), (0, 3), (3, 0), (1, 1)])
def test_positions_by_torch_are_those_by_numpy(shape, monkeypatch):
    mask = torch.rand(shape) < 0.4
    positions = mask.flatten().nonzero().squeeze(1)
    here = Pattern.from_positions(positions, shape)
    monkeypatch.setattr("sparselottery.pattern.divisible", lambda *_: False)
    elsewhere = Pattern.from_positions(positions, shape)
    for one, other in zip(here.indices, elsewhere.indices, strict=True):
        assert one.dtype == other.dtype == torch.int32
        assert torch.equal(one, other)
    expected = elsewhere.positions()
    assert torch.equal(expected, positions)
    monkeypatch.undo()
    assert torch.equal(here.positions(), expected)
    assert here.positions().dtype == torch.int64


@pytest.mark.parametrize("native", [True, False])
@given(mask=masks, data=st.data())
def test_a_copy_has_memory_of_its_own_and_is_checked(native, mask, data):
    pattern = Pattern.from_mask(mask)
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(native_library, "available", lambda: False)
        copy = pattern.copied(torch.device("cpu"))
        spread = Pattern(*(torch.stack([each, each], 1)[:, 0] for each in pattern.indices), pattern.shape)
        narrow = Pattern(pattern.crow_indices, pattern.col_indices.to(torch.int16), pattern.shape)
        for made in copy, spread.copied(torch.device("cpu")), narrow.copied(torch.device("cpu")):
            for new, old in zip(made.indices, pattern.indices, strict=True):
                assert torch.equal(new, old)
                assert (new.dtype, new.is_contiguous()) == (torch.int32, True)
        if pattern.nnz:
            assert copy.col_indices.data_ptr() != pattern.col_indices.data_ptr()
            at = data.draw(st.integers(0, pattern.nnz - 1))
            columns = pattern.col_indices.clone()
            columns[at] = data.draw(st.sampled_from([-1, pattern.shape[1]]))
            with pytest.raises(ValueError, match="col_indices: expected"):
                Pattern(pattern.crow_indices, columns, pattern.shape).copied(torch.device("cpu"))
        with pytest.raises(ValueError, match="crow_indices: expected length"):
            Pattern(pattern.crow_indices[1:], pattern.col_indices, pattern.shape).copied(torch.device("cpu"))
