"""A weight-sparse GPT on the CPU: `python -m benchmarks.sparse_gpt` writes sparse-gpt.csv.

Four layers of width 512 learn sums written as characters. After each step of AdamW the largest 1 % of the weights stay,
at first more (`dynamic.topk`). Embeddings, norms and the head are dense. A row for each `impl`: the milliseconds of a
step at the end, forward, backward, optimiser and masks included, and of its parts. `loss_difference` is the largest
over the first steps, annealing included, from training dense weights that are multiplied by the same masks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import results
from benchmarks.timing import Candidate, race
from sparselottery import convert, dynamic
from sparselottery.convert import masks_of

CHARACTERS = "0123456789+=\n"
LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 4, 512, 8, 128, 4
DENSITY, RATE, DECAY = 0.01, 1e-3, 0.1


class Block(nn.Module):
    """Pre-norm attention and MLP. x (B, T, width) -> (B, T, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.project = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        hidden = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        self.norm2, self.mlp = nn.LayerNorm(width), nn.Sequential(*hidden)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.project(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    """Characters (B, T) -> logits (B, T, characters)."""

    def __init__(self, layers: int = LAYERS, width: int = WIDTH, heads: int = HEADS, context: int = CONTEXT) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(len(CHARACTERS), width), nn.Embedding(context, width)
        for embedding in (self.characters, self.places):
            nn.init.normal_(embedding.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(CHARACTERS))

    def forward(self, x: Tensor) -> Tensor:
        places = self.places.weight[: x.shape[1]]
        return self.head(self.norm(self.blocks(self.characters(x) + places)))


def batches(batch: int, context: int, seed: int = 0) -> Iterator[Tensor]:
    """Endless (batch, context + 1) of sums, a line each, cut anywhere."""
    generator = torch.Generator().manual_seed(seed)
    index = {character: number for number, character in enumerate(CHARACTERS)}
    while True:
        wanted, text = batch * (context + 1), ""
        while len(text) < wanted:
            a, b = torch.randint(1000, (2,), generator=generator).tolist()
            text += f"{a}+{b}={a + b}\n"
        yield torch.tensor([index[each] for each in text[:wanted]]).view(batch, context + 1)


def loss_of(model: nn.Module, text: Tensor) -> Tensor:
    return F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def dense(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY, fused=True)


class Sparse:
    """Top-k after each step. `step(text)` returns the loss."""

    def __init__(self, net: nn.Module, density: float, end: int, initial: float = 1.0) -> None:
        whole = {
            f"{name}.weight": torch.ones_like(layer.weight, dtype=torch.bool)
            for name, layer in net.blocks.named_modules(prefix="blocks")
            if isinstance(layer, nn.Linear)
        }
        self.model = convert(net, whole)
        self.optimizer = dense(self.model)
        self.updater = dynamic.topk(self.model, self.optimizer, density, end=end, initial=initial)

    def step(self, text: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = loss_of(self.model, text)
        loss.backward()
        self.optimizer.step()
        self.updater.step()
        return loss.detach()


class Masked:
    """The same on dense weights, zeros held by masks, which are given. masks None: the dense net, nothing pruned."""

    def __init__(self, net: nn.Module, masks: dict[str, Tensor] | None) -> None:
        self.model, self._masks, self.optimizer = net, masks or {}, dense(net)

    @torch.no_grad()
    def follow(self, masks: dict[str, Tensor]) -> None:
        """Who survives keeps its moments, others begin at zero."""
        for name, mask in masks.items():
            weight = self.model.get_parameter(name)
            stays = mask & self._masks[name]
            for tensor in (weight, *(self.optimizer.state[weight][key] for key in ("exp_avg", "exp_avg_sq"))):
                tensor *= stays
        self._masks = masks

    def step(self, text: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = loss_of(self.model, text)
        loss.backward()
        for name, mask in self._masks.items():
            self.model.get_parameter(name).grad *= mask
        self.optimizer.step()
        return loss.detach()


def fresh(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def loss_curves(make: Callable[[], nn.Module], density: float, steps: int, batch: int) -> Iterator[tuple[float, float]]:
    """Of each step the loss of sparse training and of dense weights with its masks."""
    ours = Sparse(fresh(make), density, end=max(1, steps // 2))
    theirs = Masked(fresh(make), masks_of(ours.model))
    context = theirs.model.places.weight.shape[0]
    for text in islice(batches(batch, context), steps):
        yield float(ours.step(text)), float(theirs.step(text))
        theirs.follow(masks_of(ours.model))


def step_ms(make: Callable[[], nn.Module], density: float, batch: int, budget: float) -> dict[str, float]:
    """Medians, in turn: of a step at the end, of a dense one, and of what is not the matrices that were pruned."""
    ours = Sparse(fresh(make), density, end=2, initial=density)
    ours.updater.drop_fraction = dynamic.constant(0.1)  # as while it explores
    ours.updater.end = None
    theirs = Masked(fresh(make), None)
    context = theirs.model.places.weight.shape[0]
    text = next(batches(batch, context))
    rest = Rest(theirs.model, batch, context)
    runs = {
        results.OURS: partial(ours.step, text),
        "dense": partial(theirs.step, text),
        "masks": ours.updater.step,
        "attention": rest.attention,
        "gelu": rest.gelu,
    }
    for run in runs.values():
        run()
    timing = race({name: Candidate(run, list) for name, run in runs.items()}, [], 0.0, budget)
    return {name: 1e3 * seconds for name, seconds in timing.seconds.items()}


class Rest:
    """What neither way makes sparse, of all layers, forward and backward."""

    def __init__(self, model: Gpt, batch: int, context: int) -> None:
        heads, width = model.blocks[0].heads, model.norm.normalized_shape[0]
        shape = (3, batch, heads, context, width // heads)
        self._layers, self._qkv = len(model.blocks), torch.randn(shape, requires_grad=True)
        self._hidden = torch.randn(batch, context, 4 * width, requires_grad=True)

    def attention(self) -> None:
        for _ in range(self._layers):
            F.scaled_dot_product_attention(*self._qkv, is_causal=True).sum().backward()

    def gelu(self) -> None:
        for _ in range(self._layers):
            F.gelu(self._hidden).backward(self._hidden.detach())


def rows(make: Callable[[], nn.Module], density: float, steps: int, batch: int, budget: float) -> list[dict]:
    curves = list(loss_curves(make, density, steps, batch))
    difference = max(abs(a - b) for a, b in curves)
    ms = step_ms(make, density, batch, budget)
    parts = {f"{name}_ms": f"{ms[name]:.3g}" for name in ("masks", "attention", "gelu")}
    found = []
    for impl, number in ((results.OURS, 0), ("dense", 1)):
        row = {"density": density if impl == results.OURS else 1.0, "batch": batch, "impl": impl}
        row |= {"step_ms": f"{ms[impl]:.4g}", "of_dense": f"{ms[impl] / ms['dense']:.3f}"} | parts
        row |= {"steps": steps, "first_loss": f"{curves[0][number]:.4f}", "last_loss": f"{curves[-1][number]:.4f}"}
        found.append(row | {"loss_difference": f"{difference:.2g}"})
    found[1] |= {"masks_ms": "", "last_loss": "", "first_loss": "", "steps": "", "loss_difference": ""}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="of the loss curves; half of them anneal")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds of timing")
    parser.add_argument("--out", type=Path, default=results.FOLDER / "sparse-gpt.csv")
    args = parser.parse_args()
    torch.set_num_threads(results.THREADS)
    measured = rows(Gpt, DENSITY, args.steps, BATCH, args.budget)
    for row in measured:
        print(" ".join(f"{key}={value}" for key, value in row.items()))
    results.write(args.out, measured)


if __name__ == "__main__":
    main()
