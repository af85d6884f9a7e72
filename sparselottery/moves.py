"""Masks that move in a live model: survivors keep their values, gradient and optimiser state, and parameters stay.

    masks = prune(model, 0.1)
    set_masks(model, masks, optimizer)

A parameter of nnz values gets other values of another nnz, and is the same object, so that all who hold it go on: its
optimiser and the schedule of that, hooks, and DistributedDataParallel.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from numbers import Real
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.graph import get_gradient_edge, increment_version
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer
from torch.utils._pytree import tree_leaves

from .convert import masked_layers
from .kernels import cpu_pattern, native
from .masks import as_mask, by_name
from .nn import MaskedLayer, as_module
from .nn.base import layers_alive
from .pattern import Pattern, matrix_shape
from .weight_decay import known_optimizers

# What optimisers of torch begin with where that is not zero: the state, and the option of its group that holds it.
_FRESH = {"sum": "initial_accumulator_value", "step_size": "lr"}


class Move:
    """Values that go from the pattern `before` to another `after` it: who holds them, and what goes with them."""

    def __init__(self, layer: MaskedLayer, after: Pattern) -> None:
        self.values, self.layers, self.before, self.after = layer.values, [layer], layer.pattern, after
        self.states: list[tuple[dict[str, Any], str, float]] = []  # of optimisers: dict, key, and what newcomers have

    def tensors(self) -> list[Tensor | None]:
        """With an element a value: the values, their gradient, and the states."""
        return [self.values.data, self.values.grad, *[state[key] for state, key, _ in self.states]]

    def moved(self, fill: float) -> list[Tensor | None]:
        """The same at the pattern after it, where newcomers have the value `fill`."""
        fills = (fill, 0.0, *[fresh for *_, fresh in self.states])
        there = [(each, of_each) for each, of_each in zip(self.tensors(), fills, strict=True) if each is not None]
        moved: list[Tensor | None] = [*carried(self.before, self.after, *zip(*there, strict=True))]
        if self.values.grad is None:
            moved.insert(1, None)
        return moved

    def put(self, tensors: Sequence[Tensor | None]) -> None:
        """Others in their places."""
        _exchange(self.values, *tensors[:2])
        for (state, key, _), tensor in zip(self.states, tensors[2:], strict=True):
            state[key] = tensor


Moves = dict[int, Move]  # by the id of the values


def carried(before: Pattern, after: Pattern, tensors: Sequence[Tensor], fills: Sequence[float]) -> list[Tensor]:
    """Each (before.nnz,) -> (after.nnz,): the elements of the survivors, bit for bit, and its fill for newcomers."""
    if native.available():
        done = cpu_pattern.carried(after.indices, before.indices, after.shape[1], tensors, fills)
        if done is not None:
            return done
    sources = after.indices_in(before)
    return [  # newcomers read the end
        torch.cat([each, each.new_full((1,), fill)]).index_select(0, sources.to(each.device))
        for each, fill in zip(tensors, fills, strict=True)
    ]


def set_masks(
    model: nn.Module,
    masks: Mapping[str, Tensor | Pattern],
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    fill: float = 0.0,
) -> None:
    """Give masked layers of a model other masks, in place.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> sparse = convert(model, prune(model, 0.5))
        >>> optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1, momentum=0.9)
        >>> set_masks(sparse, prune(sparse, 0.5), optimizer)
        >>> sparse[0].nnz
        8

    A weight that survives in both masks keeps its value, its gradient and all that an optimiser knows of it, bit for
    bit. A newcomer gets the value `fill`, the gradient 0 and what its optimiser begins with, but for what is counted
    for the whole layer, as the steps of Adam are. All parameters stay the same objects. Plans of the kernels are made
    anew, and the execution stays where it is possible. Where anything raises, nothing has changed.

    masks: bool tensors or NumPy arrays of the weights' shapes, or a `Pattern` like that of the layer, keyed by
    parameter name ("fc1.weight"). Layers not named stay as they are, unless they share the values of one that is.
    optimizer: the one that trains the layers, or all of them. Its state is moved: tensors with an element a value, such
    as the moments of SGD, Adam and AdamW, also fused, foreach and capturable.

    A backward through calls before this one raises RuntimeError, and CUDA graphs have to be captured anew. An average
    of the model (`AveragedModel`) is a model of its own: give it the same masks before its next update, or it raises
    ValueError. DistributedDataParallel goes on where all processes give the same masks at the same time; its buckets
    are made anew if the number of survivors changes, and its communication hooks go on, unless they have a state.
    Raises ValueError if a name is not that of a masked layer's weight, a mask does not fit, layers that share their
    values would differ, an optimiser has state of a layer and is not given, or is given and has no parameter of the
    model or state of another kind; TypeError if a mask is not boolean or an optimiser is none.
    """
    if not isinstance(fill, Real):
        raise TypeError(f"fill: expected a number, got {type(fill).__name__}")
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as undo:
        moves = _moves(masked_layers(as_module(model)), masks)
        _find_layers(moves)
        _find_states(optimizers_of(optimizer, model, moves), moves)
        moved = [(move, move.moved(fill)) for move in moves.values()]
        reducers = _reducers({move.values for move in moves.values() if move.after.nnz != move.before.nnz})
        for reducer, state in reducers:  # undone in the opposite order
            undo.callback(_renew, reducer, state)
        layers = [(layer, move.after) for move in moves.values() for layer in move.layers]
        before = [(layer, dict(vars(layer)), dict(layer._buffers)) for layer, _ in layers]
        undo.callback(_restore, before, [(move, move.tensors()) for move in moves.values()])
        for move, tensors in moved:
            move.put(tensors)
        for layer, after in layers:
            layer.take(after)
        for reducer, state in reducers:
            _renew(reducer, state)
        undo.pop_all()


def _moves(layers: Mapping[str, MaskedLayer], masks: Mapping[str, Tensor | Pattern]) -> Moves:
    """What the masks ask for, checked."""
    moves: Moves = {}
    for name, mask in by_name(masks).items():
        if not layers:
            raise ValueError("model: expected masked layers, got none: convert(model, masks) makes them")
        if name not in layers:
            raise ValueError(f"masks: expected names among {list(layers)}, got {name!r}")
        layer = layers[name]
        values = layer._parameters.get("values")
        if type(values) is not nn.Parameter:
            got = type(layer.values).__name__
            raise ValueError(f"masks[{name!r}]: expected a layer whose values are a Parameter, got a {got}")
        if values.is_meta:
            raise ValueError(f"masks[{name!r}]: expected a layer with data, got one on the meta device")
        layer.check()
        after = _pattern(name, layer, mask)
        if id(values) not in moves:
            moves[id(values)] = Move(layer, after)
        elif not _equal(moves[id(values)].after, after):
            raise ValueError(f"masks[{name!r}]: expected the mask of the layer that it shares its values with")
    return moves


def _pattern(name: str, layer: MaskedLayer, mask: Tensor | Pattern) -> Pattern:
    """The mask of a layer as a pattern on its device, in memory of its own."""
    mask = mask if isinstance(mask, Pattern) else as_mask(name, mask)
    try:
        return _compiled(layer, mask)
    except (TypeError, ValueError) as error:
        raise type(error)(f"masks[{name!r}]: {error}") from None


def _compiled(layer: MaskedLayer, mask: Tensor | Pattern) -> Pattern:
    shape, device = matrix_shape(layer.shape), layer.values.device
    if isinstance(mask, Pattern):
        if mask.shape != shape:
            raise ValueError(f"expected a pattern of shape {shape}, got {mask.shape}")
        return mask.copied(device)
    if tuple(mask.shape) != layer.dense_shape:
        raise ValueError(f"expected shape {layer.dense_shape}, got {tuple(mask.shape)}")
    return Pattern.from_mask(layer.as_matrix(mask if mask.is_meta else mask.to(device)))


def _equal(one: Pattern, other: Pattern) -> bool:
    if (one.shape, one.nnz) != (other.shape, other.nnz):
        return False
    return all(a is b or torch.equal(a, b) for a, b in zip(one.indices, other.indices, strict=True))


def _find_layers(moves: Moves) -> None:
    """All others that hold the values, wherever they are."""
    for layer in layers_alive():
        move = moves.get(id(layer._parameters.get("values")))
        if move is not None and layer is not move.layers[0]:
            layer.check()
            if not _equal(move.before, layer.pattern):
                raise ValueError("masks: expected layers that share their values to have one mask, got two of them")
            move.layers.append(layer)


def optimizers_of(optimizer: Optimizer | Iterable[Optimizer] | None, model: nn.Module, moves: Moves) -> list[Optimizer]:
    """The optimisers, checked: nobody else has state that would no longer fit."""
    several = isinstance(optimizer, Iterable | None)
    given = list(optimizer or ()) if several else [optimizer]
    for each in given:
        if not isinstance(each, Optimizer):
            raise TypeError(f"optimizer: expected torch.optim.Optimizers, got {type(each).__name__}")
        trained = {id(parameter) for group in each.param_groups for parameter in group["params"]}
        if trained.isdisjoint(moves) and trained.isdisjoint(map(id, model.parameters())):
            raise ValueError(f"optimizer: expected one of the model, got {type(each).__name__} of other parameters")
    forgotten = known_optimizers(
        lambda each: each not in given and any(_kept_by(each, move.values) for move in moves.values())
    )
    if forgotten:
        raise ValueError(f"optimizer: expected all that train the layers, got no {type(forgotten[0]).__name__}")
    return given


def _kept_by(optimizer: Optimizer, values: nn.Parameter) -> dict[str, Any]:
    """The state that the optimiser has for single values, or for who knows what: all but what is one number."""

    def is_one(entry: Any) -> bool:
        if not isinstance(entry, Tensor):
            return all(is_one(each) for each in tree_leaves(entry) if isinstance(each, Tensor))
        return entry.numel() == 1 and entry.shape != values.shape

    return {key: entry for key, entry in optimizer.state.get(values, {}).items() if not is_one(entry)}


def _find_states(optimizers: list[Optimizer], moves: Moves) -> None:
    """All that moves, checked."""
    for optimizer in optimizers:
        options = {id(each): group for group in optimizer.param_groups for each in group["params"]}
        for move in (move for each, move in moves.items() if each in options):
            parameter, group = move.values, options[id(move.values)]
            if isinstance(optimizer, LBFGS):
                raise ValueError("optimizer: expected state of each parameter, got LBFGS, which has one of them all")
            for key, entry in _kept_by(optimizer, parameter).items():
                if not isinstance(entry, Tensor) or entry.shape != parameter.shape:
                    got = tuple(entry.shape) if isinstance(entry, Tensor) else f"a {type(entry).__name__}"
                    name = f"{type(optimizer).__name__}'s {key!r}"
                    raise ValueError(f"optimizer: expected {name} to be of shape {tuple(parameter.shape)}, got {got}")
                fresh = float(group.get(_FRESH.get(key), 0.0))
                move.states.append((optimizer.state[parameter], key, fresh))


def _exchange(values: nn.Parameter, data: Tensor, grad: Tensor | None) -> None:
    """Other values and their gradient in a Parameter; graphs of calls on the old ones raise."""
    if data.shape != values.shape:
        values.grad = None
        # Graphs that are still alive hold a node that sums up gradients of the old size. Another dtype parts with it.
        if values.requires_grad:
            get_gradient_edge(values).node.register_prehook(_refuse)
        values.data = data.new_empty(0, dtype=torch.float32 if data.dtype == torch.float64 else torch.float64)
    values.data, values.grad = data, grad
    if not values.is_inference():  # which has no version
        increment_version(values)


def _refuse(_: tuple[Tensor, ...]) -> None:
    raise RuntimeError("backward: expected a graph of calls after the last set_masks, got one of a call before it")


def _restore(
    layers: Iterable[tuple[MaskedLayer, dict[str, Any], dict[str, Tensor | None]]],
    tensors: Iterable[tuple[Move, Sequence[Tensor | None]]],
) -> None:
    """What layers, with their attributes and buffers, and moves had before."""
    for layer, attributes, buffers in layers:
        vars(layer).clear()
        vars(layer).update(attributes)
        layer._buffers.update(buffers)
    for move, before in tensors:
        move.put(before)


def _reducers(resized: set[nn.Parameter]) -> list[tuple[DistributedDataParallel, dict[str, Any]]]:
    """The DistributedDataParallel modules with buckets for these, and the state from which each makes new ones."""
    if not (resized and distributed.is_available() and distributed.is_initialized()):
        return []
    found = [each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel)]
    found = [each for each in found if not resized.isdisjoint(each.parameters())]
    states = [state for each in found for _, state in each._comm_hooks]
    if strange := [state for state in states if not isinstance(state, distributed.ProcessGroup | None)]:
        got = type(strange[0]).__name__  # as PowerSGD's, which is of the size of the buckets
        raise ValueError(
            f"model: expected a DistributedDataParallel whose hooks have no state where nnz changes, got {got}"
        )
    return [(each, each.__getstate__()) for each in found]  # refuses a group of its own


def _renew(module: DistributedDataParallel, state: dict[str, Any]) -> None:
    """Another reducer, with the hooks of the last one."""
    module.__setstate__(state)
    for hook, of_hook in module._comm_hooks:
        distributed._register_comm_hook(module.reducer, of_hook, hook)
