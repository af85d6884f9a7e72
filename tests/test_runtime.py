"""load_sparse: the frozen model computes what the dense one does, whichever way it takes."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from sparselottery import Ticket, convert, prune, to_dense
from sparselottery.kernels import cpu_net
from sparselottery.lab.models import CIFAR10, build
from sparselottery.nn import MaskedLayer
from sparselottery.runtime import layer as layer_module
from sparselottery.runtime import load_sparse
from sparselottery.runtime import sequential as run_module
from sparselottery.runtime.layer import FrozenLayer
from sparselottery.runtime.sequential import FrozenSequential

BATCHES = (1, 2, 3, 16, 33, 70)  # linear layers: one sample, some, many; convolutions: few images, many


def mlp(last_relu: bool = False) -> nn.Sequential:
    layers = [nn.Linear(37, 70), nn.ReLU(), nn.Linear(70, 29, bias=False), nn.ReLU(), nn.Linear(29, 5)]
    return nn.Sequential(*layers, *([nn.ReLU()] if last_relu else []))


def conv_net(**last) -> nn.Sequential:
    """Of everything that one call takes, on odd sizes: (N, 3, 17, 15) -> (N, 7)."""
    return nn.Sequential(
        nn.Conv2d(3, 10, 3, padding=1),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(10, 12, (3, 5), stride=(2, 1), padding=(0, 2), bias=False),
        nn.ReLU(),
        nn.Dropout(),
        nn.Conv2d(12, 8, 3, padding=2, dilation=2, groups=2),
        nn.BatchNorm2d(8, affine=False),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(8, 7),
    )


def flat_net() -> nn.Sequential:
    """A convolution with a 4 x 4 kernel and stride 3, then linear layers: (N, 4, 13, 13) -> (N, 6)."""
    conv = nn.Conv2d(4, 9, 4, stride=3, padding=2)
    return nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(9, 20), nn.ReLU(), nn.Linear(20, 6))


NETS = {
    "mlp": (mlp, (37,)),
    "mlp with a last ReLU": (lambda: mlp(True), (37,)),
    "conv net": (conv_net, (3, 17, 15)),
    "flat net": (flat_net, (4, 13, 13)),
    "wide images": (lambda: nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)), (2, 6, 300)),
    "one linear": (lambda: nn.Linear(40, 30), (40,)),
    "one convolution": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 9, 9)),
    "other activations": (
        lambda: nn.Sequential(nn.Linear(20, 90), nn.GELU(), nn.Linear(90, 4), nn.Softmax(-1)),
        (20,),
    ),
    "other pooling": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.MaxPool2d(3, 2, 1), nn.Conv2d(6, 5, 3, padding_mode="reflect", padding=1)
        ),
        (3, 12, 12),
    ),
}


def saved(model: nn.Module, path, density: float = 0.3, dtype: torch.dtype = torch.float32):
    """Writes a ticket of the model with random statistics; gives the dense model with zeros, in evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    model = model.to(dtype).eval()
    sparse = convert(model, prune(model, 1 - density, method="random"))
    Ticket.from_model(sparse).save(path)
    return to_dense(sparse)


def check(frozen, dense, x, factor=1.0):
    """Within twice the error of torch in that dtype, or rounding."""
    with torch.no_grad():
        truth, theirs = copy.deepcopy(dense).double()(x.double()), dense(x)
    ours = frozen(x)
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert not ours.requires_grad
    limit = 2 * (theirs - truth).norm() + 4 * torch.finfo(x.dtype).eps * truth.norm()
    assert (ours - truth).norm() <= factor * limit


@pytest.mark.parametrize("name", NETS)
def test_like_dense(name, tmp_path, poison):
    make, shape = NETS[name]
    path = tmp_path / "net.safetensors"
    dense = saved(make(), path)
    frozen = load_sparse(path)
    for batch in BATCHES:
        check(frozen, dense, torch.randn(batch, *shape), factor=2)
    x = torch.randn(2, *shape)
    strided = torch.stack([x, x], -1)[..., 0]
    assert torch.equal(frozen(strided), frozen(x))


@pytest.mark.parametrize("name", NETS)
def test_image_by_image(name, tmp_path, monkeypatch):
    """The packed net also for batches that other kernels take by default, with fewer images than threads and more."""
    monkeypatch.setattr(run_module, "FEW_IMAGES", 1000)
    make, shape = NETS[name]
    path = tmp_path / "net.safetensors"
    dense = saved(make(), path, density=0.05)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        frozen = load_sparse(path)
        for batch in (1, 2, 7):
            check(frozen, dense, torch.randn(batch, *shape), factor=2)


def test_weights_shared_out_or_samples(tmp_path, monkeypatch):
    """Few weights: each thread has samples of its own; many: threads share out the weights."""
    path = tmp_path / "net.safetensors"
    dense = saved(NETS["mlp"][0](), path)
    for few, kind in ((0, cpu_net.Chain), (2**20, cpu_net.Rows)):
        monkeypatch.setattr(layer_module, "FEW_WEIGHTS", few)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            frozen = load_sparse(path)
            for batch in (2, 65, 128):
                check(frozen, dense, torch.randn(batch, *NETS["mlp"][1]), factor=2)
            assert {made for made, _ in frozen.net.grouped().whole._made._made} == {kind}


@pytest.mark.parametrize("batch", [1, 9, 17, 33, 64, 128])
def test_threads_change_no_bit_of_samples(tmp_path, batch):
    path, x = tmp_path / "net.safetensors", torch.randn(batch, *NETS["mlp"][1])
    saved(NETS["mlp"][0](), path)
    found = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        found.append(load_sparse(path)(x))
    assert all(torch.equal(each, found[0]) for each in found)


def test_one_call_for_a_whole_net(tmp_path):
    saved(build("vgg-19", CIFAR10, 10), tmp_path / "net.safetensors", density=0.01)
    frozen = load_sparse(tmp_path / "net.safetensors")
    assert len(frozen.net.grouped().parts) == 1
    assert frozen.net.grouped().whole is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype, tmp_path):
    dense = saved(mlp(), tmp_path / "net.safetensors", dtype=dtype)
    frozen = load_sparse(tmp_path / "net.safetensors")
    for batch in (1, 20):
        check(frozen, dense, torch.randn(batch, 37, dtype=dtype), factor=4)


def test_infinities_and_nans_stay_in_their_rows(tmp_path):
    """A column that a row does not have never reaches it."""
    dense = saved(mlp(), tmp_path / "net.safetensors", density=0.1)
    frozen = load_sparse(tmp_path / "net.safetensors")
    first = frozen.net[0]
    for special in (float("inf"), float("nan")):
        for batch in (1, 5):
            x = torch.randn(batch, 37)
            x[:, 3] = special
            with torch.no_grad():
                y = first(x)
            touched = torch.zeros(70, dtype=torch.bool)
            rows = torch.repeat_interleave(torch.arange(70), first.crow_indices.diff())
            touched[rows[first.col_indices == 3]] = True
            assert torch.equal(y.isfinite().all(0), ~touched)
    assert dense[0].weight[:, 3].ne(0).any()


def test_empty_rows_and_layers(tmp_path):
    model = mlp()
    masks = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in model.named_parameters() if w.dim() == 2}
    masks["0.weight"][5] = True
    sparse = convert(model, masks)
    Ticket.from_model(sparse).save(tmp_path / "net.safetensors")
    frozen = load_sparse(tmp_path / "net.safetensors")
    for batch in (1, 4):
        x = torch.randn(batch, 37)
        assert torch.allclose(frozen(x), sparse(x).detach(), atol=1e-6)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(24, 48), nn.Linear(48, 24), nn.LayerNorm(24)

    def forward(self, x, scale=1.0):
        return self.norm(x + scale * self.second(self.first(x).relu()))


def test_a_model_of_ones_own(tmp_path):
    path = tmp_path / "net.safetensors"
    dense = saved(Residual(), path)
    with pytest.raises(ValueError, match=r"net\.safetensors: expected a model beside it"):
        load_sparse(path)
    with torch.device("meta"):
        empty = Residual()
    for model in (empty, Residual()):
        before = [p.clone() for p in model.parameters()]
        frozen = load_sparse(path, model)
        assert all(p.is_meta or torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        assert isinstance(frozen.net.first, FrozenLayer)
        for shape in ((24,), (1, 24), (5, 24), (2, 3, 24)):
            check(frozen, dense, torch.randn(shape), factor=2)
        x = torch.randn(2, 24)
        assert torch.equal(frozen(x, scale=1.0), frozen(x))


def test_a_model_that_does_not_fit(tmp_path):
    saved(mlp(), tmp_path / "net.safetensors")
    other = mlp()
    other[0] = nn.Linear(36, 70)
    with pytest.raises(
        ValueError, match=r"net\.safetensors: model: expected the file's names and shapes, got '0.weight'"
    ):
        load_sparse(tmp_path / "net.safetensors", other)
    with pytest.raises(ValueError, match="masked layers"):
        load_sparse(tmp_path / "net.safetensors", convert(mlp(), prune(mlp(), 0.5)))


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    saved(mlp(), path)
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"net\.safetensors"):
        load_sparse(path)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"net\.safetensors"):
        load_sparse(path)
    with pytest.raises(OSError, match="missing"):
        load_sparse(tmp_path / "missing.safetensors")


@pytest.mark.parametrize("batch", [1, 2, 20])
def test_wrong_inputs(batch, tmp_path):
    for name, shape, expected in (
        ("conv net", (4, 17, 15), r"shape \(N, 3, H, W\) or \(3, H, W\), got \((N|{}), 4, 17, 15\)"),
        ("conv net", (3, 1, 1), r"an image that the windows of the pooling, 2 x 2, .* got \((N|{}), 3, 1, 1\)"),
        ("flat net", (4, 24, 24), r"shape \(\*, 9\), got \((N|{}), 81\)"),
        ("one linear", (3, 36), r"shape \(\*, 40\), got \({}, 3, 36\)"),
    ):
        saved(NETS[name][0](), tmp_path / "net.safetensors")
        with pytest.raises(ValueError, match=f"^x: expected {expected.format(batch)}"):
            load_sparse(tmp_path / "net.safetensors")(torch.randn(batch, *shape))


def test_empty_batch_and_one_sample(tmp_path):
    saved(mlp(), tmp_path / "net.safetensors")
    frozen = load_sparse(tmp_path / "net.safetensors")
    assert frozen(torch.randn(0, 37)).shape == (0, 5)
    x = torch.randn(37)
    assert torch.allclose(frozen(x), frozen(x[None])[0])


def test_frozen(tmp_path):
    saved(mlp(), tmp_path / "net.safetensors")
    frozen = load_sparse(tmp_path / "net.safetensors")
    assert not any(p.requires_grad for p in frozen.parameters())
    with pytest.raises(ValueError, match="frozen"):
        frozen.train()
    assert not frozen.eval().training
    x = torch.randn(3, 37)
    y = frozen(x)
    twin = copy.deepcopy(frozen)
    assert torch.equal(twin(x), y)
    assert twin.double()(x.double()).dtype == torch.float64
    assert torch.equal(frozen(x), y)


def test_random_state_is_left_alone(tmp_path):
    saved(conv_net(), tmp_path / "net.safetensors")
    torch.manual_seed(5)
    frozen = load_sparse(tmp_path / "net.safetensors").double()
    frozen(torch.ones(1, 3, 17, 15, dtype=torch.float64))
    after = torch.rand(4)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(4), after)


def test_dense_layers_stay_dense(tmp_path):
    model = nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 300))
    masks = prune(model, 0.9, method="random")
    masks["2.weight"] = torch.ones(300, 400, dtype=torch.bool)
    sparse = convert(model, masks)
    Ticket.from_model(sparse).save(tmp_path / "net.safetensors")
    frozen = load_sparse(tmp_path / "net.safetensors")
    assert [type(child) for child in frozen.net] == [FrozenLayer, nn.ReLU, nn.Linear]
    x = torch.randn(3, 300)
    assert torch.allclose(frozen(x), sparse(x).detach(), atol=1e-5)


def test_example_input_measures(tmp_path, monkeypatch):
    """Dense where that is said to be faster, and only layers that are dense enough to be asked about."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    masks = prune(model, 0.6, method="random")
    masks["0.weight"] = torch.rand(64, 64) < 0.02
    sparse = convert(model, masks)
    Ticket.from_model(sparse).save(tmp_path / "net.safetensors")
    monkeypatch.setattr("sparselottery.runtime.tuning.interleaved_ms", lambda *_, **__: [1.0, 0.5])
    x = torch.randn(8, 64)
    frozen = load_sparse(tmp_path / "net.safetensors", example_input=x)
    assert frozen.net[0].density < 0.1
    assert torch.allclose(frozen(x), sparse(x).detach(), atol=1e-5)
    assert not any(isinstance(m, MaskedLayer) for m in frozen.modules())


def test_threads_at_once(tmp_path):
    """Many Python threads, one model: every result as if alone, while it is packed too."""
    for name, (make, shape) in (("mlp", NETS["mlp"]), ("conv net", NETS["conv net"])):
        path = tmp_path / f"{name}.safetensors"
        saved(make(), path)
        inputs = [torch.randn(batch, *shape) for batch in (1, 2, 1, 20, 1, 3) for _ in range(20)]
        alone = load_sparse(path)
        expected = [alone(x) for x in inputs]
        frozen = load_sparse(path)
        with ThreadPoolExecutor(6) as pool:
            for got, want in zip(pool.map(frozen, inputs), expected, strict=True):
                assert torch.equal(got, want)


PEAK = """
    import sys, torch
    from torch import nn
    import sparselottery.kernels.cpu_net
    from sparselottery.runtime import load_sparse
    from pathlib import Path

    def peak():
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(lines["VmHWM"].split()[0])

    torch.set_num_threads(2)
    nn.Linear(64, 64)(torch.ones(1, 64)).sum().item()
    model = None
    if sys.argv[2] == "meta":
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(6000, 6000), nn.ReLU(), nn.Linear(6000, 6000))
    before = peak()
    frozen = load_sparse(sys.argv[1], model)
    for batch in (1, 16):
        frozen(torch.ones(batch, 6000))
    print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("model", ["none", "meta"])
def test_no_dense_weight_is_ever_made(model, tmp_path):
    """Two layers of 144 MB each at 0.2 %: the peak stays far below a single one of them, or its mask in bytes."""
    size, layers = 6000, {}
    path = tmp_path / "net.safetensors"
    from sparselottery.architecture import describe
    from sparselottery.contents import Contents
    from sparselottery.files import write
    from sparselottery.pattern import Pattern

    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))
    for name in ("0.weight", "2.weight"):
        per_row = 12
        columns = torch.stack([torch.randperm(size)[:per_row].sort().values for _ in range(size)]).flatten().int()
        crow_indices = torch.arange(0, size * per_row + 1, per_row, dtype=torch.int32)
        layers[name] = Pattern(crow_indices, columns, (size, size)), torch.randn(size * per_row)
    shapes = dict.fromkeys(layers, (size, size))
    biases = {"0.bias": torch.zeros(size), "2.bias": torch.zeros(size)}
    write(path, Contents(layers, shapes, biases, {}, describe(net)))
    command = [sys.executable, "-c", textwrap.dedent(PEAK), str(path), model]
    peak = int(subprocess.check_output(command, text=True))
    assert peak < 25e6


def test_nested_sequentials_keep_their_names(tmp_path):
    model = nn.Sequential(nn.Sequential(nn.Linear(9, 9), nn.ReLU()), nn.Sequential(nn.Linear(9, 4)))
    dense = saved(model, tmp_path / "net.safetensors")
    frozen = load_sparse(tmp_path / "net.safetensors")
    assert type(frozen.net) is FrozenSequential
    assert len(frozen.net.grouped().parts) == 1
    assert {name for name, _ in frozen.net.named_modules()} == {name for name, _ in dense.named_modules()}
    check(frozen, dense, torch.randn(1, 9))
