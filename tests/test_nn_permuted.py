"""Layers whose masks have whole blocks in another order, on the GPU's kernels: there, or in Triton's interpreter."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from blocks import blocky
from gpus import DEVICE
from torch import nn

from sparselottery import convert, explain, fold, prune, to_dense
from sparselottery.kernels import gpu
from sparselottery.orders import Order


@pytest.fixture(autouse=True)
def _on_gpu(monkeypatch):
    """CPU tensors take the GPU's kernels where there is no GPU."""
    monkeypatch.setattr(gpu, "DEVICES", (DEVICE,))


def shuffled(mask):
    generator = torch.Generator().manual_seed(1)
    return Order(*(torch.randperm(size, generator=generator) for size in mask.shape[:2])).permuted(mask)


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(36, 40), nn.ReLU(), nn.Linear(40, 3)), (5, 36)),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(20, 36, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.Flatten(),
                              nn.Linear(36 * 6, 3)),
        (2, 20, 2, 3),
    ),
}  # fmt: skip


def masked(name, bias=True):
    torch.manual_seed(0)
    make, size = MODELS[name]
    model = make()
    if not bias:
        model[0].bias = None
    mask = shuffled(blocky(tuple(model[0].weight.shape), (16, 16), 2, 0.5))
    return convert(model.to(DEVICE), {"0.weight": mask}), torch.randn(size, device=DEVICE)


def gradients(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    return y.detach(), torch.autograd.grad(y.square().sum(), [x, *model.parameters()])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_dense_model(name, bias):
    model, x = masked(name, bias)
    assert model[0].execution == "permuted"
    assert model[0].block == (16, 16)
    y, grads = gradients(model, x)
    dense_y, dense_grads = gradients(to_dense(model), x)
    torch.testing.assert_close(y, dense_y, rtol=1e-4, atol=1e-5)
    for (key, _), got, expected in zip([("x", None), *model.named_parameters()], grads, dense_grads, strict=True):
        expected = expected[model[0].mask] if key == "0.values" else expected
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_other_shapes_of_an_input():
    model, _ = masked("linear")
    for size in ((36,), (2, 3, 36)):
        x = torch.randn(size, device=DEVICE)
        torch.testing.assert_close(model(x), to_dense(model)(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"x: expected shape \(\*, 36\), got \(2, 35\)"):
        model(torch.randn(2, 35, device=DEVICE))
    conv, x = masked("conv")
    torch.testing.assert_close(conv[0](x[0]), to_dense(conv)[0](x[0]), rtol=1e-4, atol=1e-5)
    last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(conv[0](last), to_dense(conv)[0](x), rtol=1e-4, atol=1e-5)


def test_explain_says_that_it_gathers():
    row = explain(masked("linear")[0])[0]
    assert row["execution"] == "permuted"
    assert row["why"] == "not measured; it gathers its input and puts its output back"


def test_a_folded_net_gathers_its_inputs_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 3)).to(DEVICE)
    hidden = {"0.weight": (16, 16), "2.weight": (16, 16)}
    masked = convert(model, prune(model, 0.5, granularity=hidden, permute=True))
    folded = fold(masked)
    assert [row["execution"] for row in explain(masked)] == ["permuted", "permuted", "sparse"]
    assert [row["execution"] for row in explain(folded)] == ["block", "block", "sparse"]
    assert (folded[0].block[1], folded[2].block) == (1, (16, 16))
    folded[0].execution = "permuted"
    assert folded[0].block == (16, 16)
    assert explain(folded)[0]["why"] == "set by hand; it gathers its input"
    x = torch.randn(5, 48, device=DEVICE)
    torch.testing.assert_close(folded(x), masked(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(folded(x), to_dense(folded)(x), rtol=1e-4, atol=1e-5)


def test_explain_counts_what_blocks_of_one_column_rewrite():
    rows = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    mask = blocky((40, 36), (16, 1), 2, 0.5)[rows]
    model = convert(nn.Sequential(nn.Linear(36, 40), nn.ReLU()).to(DEVICE), {"0.weight": mask})
    assert (model[0].execution, model[0].block) == ("permuted", (16, 1))
    (row,) = explain(model)
    assert (row["packs"], row["why"]) == (2, "not measured; it puts its output back")
    assert explain(masked("linear")[0])[0]["packs"] == 0
    x = torch.randn(5, 36, device=DEVICE)
    torch.testing.assert_close(model(x), to_dense(model)(x), rtol=1e-4, atol=1e-5)


def test_why_not():
    model, _ = masked("linear")
    layer = model[0]
    assert layer.executions == ("sparse", "permuted", "compact", "dense")
    blocks = convert(nn.Linear(36, 40).to(DEVICE), {"weight": blocky((40, 36), (16, 16), 2, 0.5)})
    assert blocks.execution == "block"
    with pytest.raises(ValueError, match=r"its mask has whole blocks \(16, 16\) as it is"):
        blocks.execution = "permuted"
    single = convert(nn.Linear(36, 40).to(DEVICE), {"weight": torch.rand(40, 36) < 0.5})
    assert single.execution == "sparse"
    with pytest.raises(ValueError, match="its mask has no whole blocks in any order of its rows and columns"):
        single.execution = "permuted"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "DEVICES", ())
        plain = convert(nn.Linear(36, 40), {"weight": layer.mask})
        assert plain.execution == "sparse"
        with pytest.raises(ValueError, match="there are no kernels for blocks of such a layer on"):
            plain.execution = "permuted"


def test_another_execution_and_back():
    model, x = masked("linear")
    expected = model(x)
    model[0].execution = "sparse"
    assert model[0].block == (1, 1)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    model[0].execution = None
    assert torch.equal(model(x), expected)


def test_copies_and_checkpoints_know_the_order():
    model, x = masked("linear")
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert not [name for name in model.state_dict() if name.startswith("0._")]
    other = convert(MODELS["linear"][0]().to(DEVICE), {"0.weight": torch.ones(40, 36, dtype=torch.bool)})
    other.load_state_dict(torch.load(file))
    assert other[0].execution == "permuted"
    assert torch.equal(other(x), expected)


def test_another_mask_has_another_order():
    model, x = masked("linear")
    state = model.state_dict()
    other = convert(to_dense(model), {"0.weight": shuffled(model[0].mask)})
    model.load_state_dict(other.state_dict())
    assert model[0].execution == "permuted"
    torch.testing.assert_close(model(x), to_dense(model)(x), rtol=1e-4, atol=1e-5)
    model.load_state_dict(state)
    torch.testing.assert_close(model(x), to_dense(model)(x), rtol=1e-4, atol=1e-5)
