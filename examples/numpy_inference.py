"""Inference from an npz export with numpy and scipy alone.

sparselottery export RUN --format npz --fold-batchnorm --out trained
python examples/numpy_inference.py trained inputs.npy outputs.npy
"""

import json
import sys
from pathlib import Path

import numpy as np
import scipy.sparse


def load(folder):
    """(architecture, weights): each weight a scipy CSR matrix (O, I), all other tensors numpy arrays."""
    folder = Path(folder)
    head = json.loads((folder / "ticket.json").read_text())
    with np.load(folder / "dense.npz") as dense:
        weights = dict(dense)
    weights.update({name: scipy.sparse.load_npz(folder / f"{name}.npz") for name in head["shapes"]})
    return head["architecture"], weights


def run(node, weights, x, name=""):
    """The described model on x: (N, features) or (N, C, H, W)."""
    kind, arguments = node["type"], node.get("arguments", {})
    if kind == "Sequential":
        for child, inner in node["children"]:
            x = run(inner, weights, x, f"{name}.{child}" if name else child)
        return x
    if kind == "Linear":
        return (weights[f"{name}.weight"] @ x.T).T + weights.get(f"{name}.bias", 0)
    if kind == "Conv2d":
        return convolve(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), arguments)
    if kind == "ReLU":
        return np.maximum(x, 0)
    if kind == "MaxPool2d":
        side = arguments["kernel_size"]
        windows = np.lib.stride_tricks.sliding_window_view(x, (side, side), axis=(2, 3))
        return windows[:, :, :: arguments["stride"], :: arguments["stride"]].max((-2, -1))
    if kind == "AdaptiveAvgPool2d" and arguments["output_size"] == 1:
        return x.mean((2, 3), keepdims=True)
    if kind == "Flatten":
        return x.reshape(len(x), -1)
    if kind in ("Identity", "Dropout"):
        return x
    raise NotImplementedError(kind)


def convolve(x, weight, bias, arguments):
    """(N, C, H, W) -> (N, O, OH, OW): the sparse matrix (O, C * kh * kw) times all windows, side by side."""
    (top, left), (kernel_h, kernel_w) = arguments["padding"], arguments["kernel_size"]
    padded = np.pad(x, ((0, 0), (0, 0), (top, top), (left, left)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel_h, kernel_w), axis=(2, 3))
    windows = windows[:, :, :: arguments["stride"][0], :: arguments["stride"][1]]  # (N, C, OH, OW, kh, kw)
    n, _, height, width = windows.shape[:4]
    columns = windows.transpose(1, 4, 5, 0, 2, 3).reshape(-1, n * height * width)
    y = (weight.reshape(len(weight), -1) if isinstance(weight, np.ndarray) else weight) @ columns
    y = y.reshape(-1, n, height, width).transpose(1, 0, 2, 3)
    return y if bias is None else y + bias[:, None, None]


if __name__ == "__main__":
    folder, inputs, outputs = sys.argv[1:]
    np.save(outputs, run(*load(folder), np.load(inputs)))
