"""Two convolutions in one native call: where they are one, and that it gives the bits of two."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparselottery import MaskedConv2d, MaskedSequential
from sparselottery.kernels import native
from sparselottery.nn import sequential

pytestmark = pytest.mark.skipif(not native.available(), reason=native.status())
LEVELS = native.LEVELS.get(torch.backends.cpu.get_cpu_capability(), ("base",))


def conv(inputs: int, outputs: int, size: int = 3, density: float = 0.5, **how) -> MaskedConv2d:
    how = {"padding": size // 2, **how}
    mask = torch.rand(outputs, inputs // how.get("groups", 1), size, size) < density
    return MaskedConv2d(inputs, outputs, size, mask=mask, **how)


def net(first: MaskedConv2d, second: MaskedConv2d, *rest: nn.Module, relu: bool = True) -> MaskedSequential:
    return MaskedSequential(first, *([nn.ReLU()] if relu else []), second, *rest).eval()


@pytest.fixture
def joined(monkeypatch) -> list[bool]:
    """Of each two convolutions that a model came to: were they one call?"""
    seen, run = [], sequential.run_two_convs

    def watched(x, steps):
        y = run(x, steps)
        seen.append(y is not None)
        return y

    monkeypatch.setattr(sequential, "run_two_convs", watched)
    return seen


def separately(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        return model(x).detach()


JOINED = {
    "a pool": lambda: net(conv(2, 20), conv(20, 20), nn.ReLU(), nn.MaxPool2d(2)),
    "no ReLU anywhere": lambda: net(conv(2, 20), conv(20, 20), relu=False),
    "no biases": lambda: net(conv(1, 16, bias=False), conv(16, 16, bias=False), nn.ReLU()),
    "a norm after the second": lambda: net(conv(2, 24), conv(24, 24), nn.BatchNorm2d(24), nn.ReLU()),
    "no padding of the first": lambda: net(conv(2, 20, padding=0), conv(20, 20)),
    "a wide pool": lambda: net(conv(2, 20), conv(20, 20), nn.ReLU(), nn.MaxPool2d(3)),
    "rows without weights": lambda: net(conv(2, 20, density=0.05), conv(20, 30, density=0.1)),
    "groups": lambda: net(conv(4, 64, groups=2), conv(64, 64, groups=2), nn.ReLU()),
    "a chain after it": lambda: net(conv(2, 20), conv(20, 20), nn.ReLU(), conv(20, 4), nn.ReLU()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [64, 33])
@pytest.mark.parametrize("name", JOINED)
def test_the_bits_of_two_calls(name, batch, dtype, joined):
    model = JOINED[name]().to(dtype)
    x = torch.randn(batch, model[0].in_channels, 13, 10, dtype=dtype)
    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        expected = separately(model, images)
        with torch.no_grad():
            y = model(images)
        assert torch.equal(y, expected)
        assert y.stride() == expected.stride()
    assert joined[0]
    assert joined[-1]


def test_the_convolutions_of_torch(joined):
    first, second = conv(2, 20), conv(20, 24)
    model, x = net(first, second, nn.ReLU(), nn.MaxPool2d(2)), torch.randn(40, 2, 32, 32)
    truth = F.conv2d(x.double(), first.weight.double(), first.bias.double(), padding=1).relu()
    truth = F.conv2d(truth, second.weight.double(), second.bias.double(), padding=1).relu()
    with torch.inference_mode():
        y = model(x)
    assert joined == [True]
    torch.testing.assert_close(y.double(), F.max_pool2d(truth, 2).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_threads_change_no_bit(level, joined, monkeypatch):
    paths = sorted(native.Path(native.__file__).parent.glob(f"_native_{level}.*"))
    if not paths:
        pytest.skip(f"{level} was not built")
    model, x, found = net(conv(2, 20), conv(20, 20), nn.ReLU(), nn.MaxPool2d(2)), torch.randn(70, 2, 20, 20), []
    monkeypatch.setattr(native, "LIBRARY", native.load(paths[0]))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with torch.no_grad():
            found.append(model(x))
    assert joined == [True] * 3
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


NOT_JOINED = {
    "no padding of the second": lambda: net(conv(2, 40), conv(40, 40, padding=0)),
    "a first that is as large": lambda: net(conv(20, 20), conv(20, 20)),
    "rows of another pitch": lambda: net(conv(1, 40, 5), conv(40, 40)),
    "a stride": lambda: net(conv(2, 40, stride=2), conv(40, 40)),
    "a stride of the second": lambda: net(conv(2, 40), conv(40, 40, stride=2)),
    "padding that is not by zeros": lambda: net(conv(2, 40), conv(40, 40, padding_mode="reflect")),
}


@pytest.mark.parametrize("name", NOT_JOINED)
def test_two_calls(name, joined):
    model = NOT_JOINED[name]()
    x = torch.randn(32, model[0].in_channels, 12, 12)
    with torch.no_grad():
        y = model(x)
    assert joined[0] is False
    assert torch.equal(y, separately(model, x))


def test_few_images_pools_between_and_gradients_take_two_calls(joined):
    model, x = net(conv(2, 20), conv(20, 20), nn.ReLU()), torch.randn(32, 2, 12, 12)
    model(x).sum().backward()
    assert joined == []  # nobody has asked
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        model(x[:1])
        pooled = MaskedSequential(conv(2, 20), nn.MaxPool2d(2), conv(20, 20))
        pooled(x)
    assert joined == [False, False]


def test_what_is_not_finite_spreads_as_in_two_calls(joined):
    model, x = net(conv(2, 20), conv(20, 20), nn.ReLU()), torch.randn(32, 2, 12, 12)
    x[3, 1, 5, 6], x[20, 0, 0, 0] = float("inf"), float("nan")
    with torch.no_grad():
        torch.testing.assert_close(model(x), separately(model, x), rtol=0, atol=0, equal_nan=True)
    assert joined == [True]
