"""The nets whose inference is measured, pruned at random and frozen, and the other ways to run them, as calls on x.

N items of: Lenet and the MLP 784 features, the convolutional nets images of CIFAR-10's size, the encoder 128 tokens.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselottery import Ticket, convert, prune, to_dense
from sparselottery.bench_model import Call, onnx_file, onnxruntime_dense, torch_compile, torch_dense
from sparselottery.lab.models import CIFAR10, build, lenet_300_100
from sparselottery.runtime import load_sparse

TOKENS = 128
ONNX = ("onnx", "onnxscript")
NEEDS = {  # modules
    "onnxruntime": (*ONNX, "onnxruntime"),
    "openvino": (*ONNX, "openvino"),
    "mnn": (*ONNX, "MNN"),
    "mnn_sparse": (*ONNX, "MNN"),
}


class Layer(nn.Module):
    """A transformer encoder's layer, post-norm, as BERT has them: (N, tokens, width) -> the same."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = (m(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.query, self.key, self.value))
        x = self.norm1(x + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


def encoder() -> nn.Sequential:
    """BERT-base's encoder: 12 layers, width 768, 12 heads, hidden 3072."""
    return nn.Sequential(*(Layer(768, 12, 3072) for _ in range(12)))


@dataclass(frozen=True)
class Net:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of one item
    density: float


NETS = {
    "lenet-300-100": Net(lenet_300_100, (784,), 0.036),
    "mlp-2048": Net(lambda: lenet_300_100(hidden=(2048, 2048)), (784,), 0.05),
    "conv-6": Net(lambda: build("conv-6", CIFAR10, 10), CIFAR10, 0.05),
    "vgg-19": Net(lambda: build("vgg-19", CIFAR10, 10), CIFAR10, 0.05),
    "bert-base": Net(encoder, (TOKENS, 768), 0.1),
}


def frozen(net: Net, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """(the net as load_sparse gives it, the dense one with zeros): the same weights, masks of every layer at random."""
    torch.manual_seed(seed)
    model = net.make().eval()
    sparse = convert(model, prune(model, 1 - net.density, method="random"))
    with torch.device("meta"):
        empty = net.make()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        Ticket.from_model(sparse).save(path)
        return load_sparse(path, empty), to_dense(sparse).requires_grad_(False)


def channels_last(model: nn.Module, x: Tensor) -> Call:
    """Eager torch with images and weights in channels_last. `model` is left so: torch's own choice is made by then."""
    return torch_dense(model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last))


def openvino(model: nn.Module, x: Tensor) -> Call:
    """OpenVINO in fp32 for latency, on torch's number of threads, inputs and outputs shared."""
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    core = openvino.Core()
    with onnx_file(model, x) as file:
        request = core.compile_model(core.read_model(file), "CPU", settings).create_infer_request()
    given = [x.numpy()]

    def run() -> Any:
        return request.infer(given, share_inputs=True, share_outputs=True)[0]

    return run


def mnn(model: nn.Module, x: Tensor, *flags: str) -> Call:
    """MNN in fp32 on torch's number of threads; it copies its input and output. flags: of its converter."""
    import _tools  # MNN's; MNN.tools runs pip for a client that reports every conversion to MNN's makers
    import MNN

    with onnx_file(model, x) as file:
        files = ["--modelFile", file, "--MNNModel", f"{file}.mnn"]
        _tools.mnnconvert(["mnnconvert", "-f", "ONNX", *files, "--bizCode", "MNN", *flags])
        net = MNN.Interpreter(f"{file}.mnn")
    session = net.createSession({"numThread": torch.get_num_threads(), "precision": "high", "backend": "CPU"})
    y = model(x).numpy()
    given, taken = (
        MNN.Tensor(array.shape, MNN.Halide_Type_Float, array, MNN.Tensor_DimensionType_Caffe)
        for array in (x.numpy(), y)
    )
    inside, outside = net.getSessionInput(session), net.getSessionOutput(session)

    def run() -> np.ndarray:
        inside.copyFrom(given)
        net.runSession(session)
        outside.copyToHostTensor(taken)
        return y

    return run


def mnn_sparse(model: nn.Module, x: Tensor) -> Call:
    """MNN with its sparse kernels in each layer where its converter expects them to be faster."""
    return mnn(model, x, "--detectSparseSpeedUp")


def onnxruntime(model: nn.Module, x: Tensor) -> Call:
    """ONNX Runtime; of its results the only one, as all others return it."""
    call = onnxruntime_dense(model, x)
    return lambda: call()[0]


def peers(x: Tensor) -> dict[str, Callable[[nn.Module, Tensor], Call]]:
    """All other ways, by name, for inputs like x; of those in NEEDS, the ones that are installed."""
    ways = {
        "dense": torch_dense,
        "dense_compiled": torch_compile,
        "onnxruntime": onnxruntime,
        "openvino": openvino,
        "mnn": mnn,
        "mnn_sparse": mnn_sparse,
    }
    if x.dim() == 4:
        ways["dense_channels_last"] = channels_last
    return {name: way for name, way in ways.items() if all(map(importlib.util.find_spec, NEEDS.get(name, ())))}
