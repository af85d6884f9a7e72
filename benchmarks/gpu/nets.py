"""Training steps of whole nets as entries of a race: forward, cross-entropy, backward, fused Adam, in a CUDA graph.

`dense` is the step without the product by the mask, which lets pruned weights grow back: what an unpruned net costs.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import steps
from benchmarks.gpu.bars import OURS
from benchmarks.gpu.cases import Step, block, random_mask
from benchmarks.gpu.timing import Entry
from benchmarks.timing import Candidate
from sparselottery import convert, to_dense
from sparselottery.convert import prunable
from sparselottery.lab.masked_dense import masked_dense
from sparselottery.lab.models import CIFAR10, build

TOLERANCE = {"fp32": 1e-2, "bf16": 1e-1}  # rounding flips ReLUs; batchnorm over few pixels spreads each
NOISE = 4  # where torch's dense step misses the truth by more than a quarter of that, so many times as much


class Mixed(nn.Module):
    """A net under autocast to bf16, or as it is; its logits are fp32."""

    def __init__(self, net: nn.Module, autocast: bool) -> None:
        super().__init__()
        self.net, self.autocast = net, autocast

    def forward(self, x: Tensor) -> Tensor:
        if not self.autocast:
            return self.net(x)
        with _autocast(x):
            return self.net(x).float()


def _autocast(x: Tensor, enabled: bool = True) -> torch.autocast:
    """To bf16, on the device of x; without its cache, as captures need it."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled, cache_enabled=False)


class Attention(nn.Module):
    """Of D features in heads, one linear layer for queries, keys and values."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(n, t, d))


class EncoderBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer, by default ViT-B/16: (N, 3, image, image) -> (N, classes)."""

    def __init__(self, image=224, patch=16, dim=768, heads=12, depth=12, classes=1000) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (image // patch) ** 2, dim))
        self.blocks = nn.Sequential(*(EncoderBlock(dim, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


def net(name: str) -> tuple[nn.Module, tuple[int, ...], int]:
    """The net, the shape of an image and the number of classes."""
    if name == "vit-b":
        return ViT(), (3, 224, 224), 1000
    shape = (784,) if name == "lenet-300-100" else CIFAR10
    return build(name, shape, 10), shape, 10


def masks(model: nn.Module, pattern: str, density: float, device: str) -> dict[str, Tensor]:
    """A random mask for each layer; layers with less than two blocks a side are of single weights."""
    generator = torch.Generator(device).manual_seed(0)
    whole = block(pattern)
    found = {}
    for name, weight in prunable(model).items():
        fits = all(size >= 2 * step for size, step in zip(weight.shape, whole, strict=False))
        found[name] = random_mask(tuple(weight.shape), whole if fits else (1, 1), density, generator)
    return found


def race_of(case: Step, device: str) -> tuple[dict[str, Entry], list[Tensor], list[float]]:
    """Who takes part, the true gradients, and by how much each may be missed."""
    torch.manual_seed(0)
    bare, shape, classes = net(case.net)
    model = Mixed(bare, case.dtype == "bf16").to(device)
    x = torch.randn(case.batch, *shape, device=device)
    last = {"memory_format": torch.channels_last} if case.net in ("conv-6", "vgg-19") else {}
    labels = torch.randint(classes, (case.batch,), device=device)
    kept = masks(model, case.pattern, case.density, device)
    native = convert(model, kept)
    with _autocast(x, case.dtype == "bf16"):  # of which choose_execution must know
        chosen = convert(model, kept, x.to(**last) if last else x)
    dense, masked = to_dense(native), masked_dense(model, kept)
    found = {OURS: (chosen, bool(last)), f"{OURS}_native": (native, bool(last)), "dense": (dense, False),
             "masked_dense": (masked, False)}  # fmt: skip
    if last:
        found |= {"dense_channels_last": (dense, True), "masked_dense_channels_last": (masked, True)}

    def make(twin: nn.Module, in_last: bool) -> Candidate:
        own, images = copy.deepcopy(twin), x
        if in_last:
            images = x.to(**last)
            own = own if twin in (chosen, native) else own.to(**last)
        candidate = steps.step(own, images, labels, kept)
        return Candidate(candidate.run, lambda: [gradient.contiguous() for gradient in candidate.read()])

    exact = Mixed(copy.deepcopy(dense.net), autocast=False)
    truth = steps.true_gradients(exact, x, labels, kept)
    allowed = [max(TOLERANCE[case.dtype], NOISE * error) for error in _errors(make(dense, False), truth)]
    entries = {
        name: Entry(partial(make, *how), "dense" in name, _executions(how[0]), captured=True)
        for name, how in found.items()
    }
    return entries, truth, allowed


def _errors(candidate: Candidate, truth: list[Tensor]) -> list[float]:
    """Relative, of each gradient after one step."""
    candidate.run()
    return [
        float((got.double() - right).norm() / right.norm().clamp(min=1e-30))
        for got, right in zip(candidate.read(), truth, strict=True)
    ]


def _executions(model: nn.Module) -> str:
    """How many masked layers run how: "block 12 dense 1"."""
    found = [layer.execution for layer in model.modules() if hasattr(layer, "execution")]
    return " ".join(f"{name} {found.count(name)}" for name in sorted(set(found)))
