"""The grammar of native calls: which children are one group, and that observed ones are in none."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from sparselottery import MaskedConv2d, MaskedLinear, MaskedSequential
from sparselottery.architecture import ELEMENTWISE, NOTHING
from sparselottery.nn import fuse
from sparselottery.nn.sequential import native_layer

SEPARATE, JOINED = fuse.Rules(native_layer), fuse.Rules(native_layer, joined=True)


def linear():
    return MaskedLinear(8, 8, mask=torch.rand(8, 8) < 0.5)


def conv():
    return MaskedConv2d(8, 8, 3, padding=1, mask=torch.rand(8, 8, 3, 3) < 0.5)


KINDS = {
    "L": linear,
    "C": conv,
    "B": lambda: nn.BatchNorm2d(8).eval(),
    "T": lambda: nn.BatchNorm2d(8),  # in training
    "R": nn.ReLU,
    "P": lambda: nn.MaxPool2d(2),
    "A": lambda: nn.AdaptiveAvgPool2d(1),
    "F": nn.Flatten,
    "G": nn.GELU,
}
# Children, and the groups in brackets: of separate calls, and of a joined one.
CASES = [
    ("L", "[L]", "[L]"),
    ("LRLRL", "[LRLRL]", "[LRLRL]"),
    ("LRLR", "[LRL]R", "[LRLR]"),
    ("LL", "[L][L]", "[LL]"),
    ("RLRRL", "R[L]RR[L]", "R[LR]R[L]"),
    ("LGL", "[L]G[L]", "[L]G[L]"),
    ("CBRPC", "[CBRP][C]", "[CBRPC]"),
    ("CRB", "[CR]B", "[CR]B"),
    ("CTR", "[C]TR", "[C]TR"),
    ("CPR", "[CP]R", "[CP]R"),
    ("CRLR", "[CR][L]R", "[CR][LR]"),
    ("CRFLRL", "[CR]F[LRL]", "[CRFLRL]"),
    ("CRF", "[CR]F", "[CR]F"),
    ("CRAFL", "[CR]AF[L]", "[CRAFL]"),
    ("CAF", "[C]AF", "[CAF]"),
    ("CAL", "[C]A[L]", "[C]A[L]"),
    ("LFL", "[L]F[L]", "[LFL]"),
    ("LCR", "[L][CR]", "[L][CR]"),
    ("CFC", "[C]F[C]", "[C]F[C]"),
    ("LRC", "[L]R[C]", "[LR][C]"),
]


def shown(children, rules) -> str:
    names = {id(child): name for child, name in children}
    parts = fuse.groups([child for child, _ in children], rules)
    text = [
        f"[{''.join(names[id(child)] for child in part.children)}]" if isinstance(part, fuse.Group) else names[id(part)]
        for part in parts
    ]
    return "".join(text)


@pytest.mark.parametrize(("letters", "separate", "joined"), CASES)
def test_groups(letters, separate, joined):
    children = [(KINDS[letter](), letter) for letter in letters]
    assert shown(children, SEPARATE) == separate
    assert shown(children, JOINED) == joined


def parametrized(module):
    module.register_buffer("one", torch.ones(()))
    parametrize.register_parametrization(module, "one", nn.Identity())


OBSERVERS = {
    "forward": lambda module: module.register_forward_hook(lambda *_: None),
    "forward pre": lambda module: module.register_forward_pre_hook(lambda *_: None),
    "backward": lambda module: module.register_full_backward_hook(lambda *_: None),
    "backward pre": lambda module: module.register_full_backward_pre_hook(lambda *_: None),
    "a forward of its own": lambda module: setattr(module, "forward", module.forward),
    "parametrized": parametrized,
}


@pytest.mark.parametrize("kind", OBSERVERS)
@pytest.mark.parametrize("letters", ["LRL", "CBRP", "CAF", "CFL"])
def test_what_is_observed_is_in_no_group(letters, kind):
    for at in range(len(letters)):
        children = [(KINDS[letter](), letter) for letter in letters]
        OBSERVERS[kind](children[at][0])
        for rules in (SEPARATE, JOINED):
            groups = [g for g in fuse.groups([c for c, _ in children], rules) if isinstance(g, fuse.Group)]
            assert all(child is not children[at][0] for group in groups for child in group.children)


def test_parametrized_layers_compute_what_they_should():
    model = MaskedSequential(linear(), nn.ReLU(), linear())
    parametrize.register_parametrization(model[2], "bias", nn.Tanh())
    x = torch.randn(4, 8)
    torch.testing.assert_close(model(x), nn.Sequential(*model)(x))


ALL = [
    kind
    for module in (nn.modules.activation, nn.modules.dropout, nn.modules.linear)
    for kind in vars(module).values()
    if inspect.isclass(kind) and kind.__module__ == module.__name__ and not kind.__name__.startswith("_")
]
ARGUMENTS = {nn.Threshold: (0.1, 0.0)}
NEVER = (
    nn.MultiheadAttention, nn.Linear, nn.Bilinear, nn.LazyLinear, nn.Softmax2d,
    nn.modules.linear.NonDynamicallyQuantizableLinear,
)  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind not in NEVER], ids=lambda kind: kind.__name__)
def test_every_elementwise_module_that_keeps_strides_is_known(kind):
    """Whatever torch.nn adds is told apart by what it does to a batch-minor input."""
    module, x = kind(*ARGUMENTS.get(kind, ())), torch.randn(16, 32).t()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = [module.train(mode)(x) for mode in (True, False)]
        kept = all(y.stride() == x.stride() for y in outputs)
        turned = module(x.t())
    elementwise = outputs[1].shape == x.shape and torch.allclose(turned.t(), outputs[1], atol=1e-6)
    assert (kept and elementwise) == (kind in (*fuse.ELEMENTWISE, *fuse.NOTHING))
    if kind in fuse.NOTHING:
        assert torch.equal(outputs[1], x)


def test_the_lists_of_descriptions_are_these():
    assert set(NOTHING) == set(fuse.NOTHING)
    assert set(ELEMENTWISE) - set(fuse.ELEMENTWISE) == {nn.LogSigmoid}  # which writes contiguously


def hooked(model):
    model[2].register_forward_hook(lambda *_: None)


EDITS = {
    "a child replaced": lambda model: setattr(model, "1", nn.Tanh()),
    "a child more": lambda model: model.append(nn.ReLU()),
    "an execution": lambda model: setattr(model[2], "execution", "dense"),
    "a hook": hooked,
    "a forward": lambda model: setattr(model[1], "forward", torch.tanh),
    "the children": lambda model: setattr(model, "_modules", {**model._modules, "1": nn.Tanh()}),
    "windows": lambda model: setattr(model[4], "kernel_size", 3),
    **{
        name: lambda model, name=name, value=value: setattr(model[4], name, value)
        for name, value in [
            ("stride", 1),
            ("padding", 1),
            ("dilation", 2),
            ("ceil_mode", True),
            ("return_indices", True),
        ]
    },
    "parametrized": lambda model: parametrize.register_parametrization(model[2], "bias", nn.Tanh()),
}


@pytest.mark.parametrize("edit", EDITS)
def test_kept_groups_follow_edits(edit):
    model = MaskedSequential(linear(), nn.ReLU(), linear(), nn.Unflatten(0, (1, 8)), nn.MaxPool2d(2, 2))
    x = torch.randn(8, 8)
    first = model(x)
    kept = model._groups(x)
    assert model._groups(x) is kept
    EDITS[edit](model)
    assert model._groups(x) is not kept
    torch.testing.assert_close(model(x), nn.Sequential(*model)(x))
    assert model._groups(x) is model._groups(x)
    assert first.shape == (1, 4, 4)


def test_kept_groups_follow_the_mode():
    model = MaskedSequential(conv(), nn.BatchNorm2d(8), nn.ReLU())
    x = torch.randn(3, 8, 5, 5)
    for mode in (True, False, True):
        for grad in (True, False, True):
            model.train(mode)
            with torch.set_grad_enabled(grad):
                assert [len(g.children) for g in model._groups(x) if isinstance(g, fuse.Group)] == (
                    [3] if not mode and not grad else [1]
                )


def test_a_copy_keeps_groups_of_its_own():
    model = MaskedSequential(linear(), nn.ReLU(), linear())
    x = torch.randn(3, 8)
    model(x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].values.zero_()
    torch.testing.assert_close(twin(x), nn.Sequential(*twin)(x))
    twin[1] = nn.Tanh()
    torch.testing.assert_close(twin(x), nn.Sequential(*twin)(x))
