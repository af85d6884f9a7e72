"""Hostile ticket files: bytes altered at random, and contents altered at random with the digest made right again."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from copy import deepcopy

import torch
from safetensors.torch import save
from torch import nn

from sparselottery import convert
from sparselottery.files import digest, read_safetensors
from sparselottery.ticket import Ticket

VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 7, 2**15, 2**16, 2**31 - 1, 2**31, -(2**31), 2**63, 10**30, 0.5, 1e308,
    float("nan"), float("inf"), "", "0", "weight", "../../etc/x.weight", "/x.weight", "a/b", "\0", "Linear",
    "os.system", [], {}, [[]], [0, 0], [2**31 - 1, 2**31 - 1], [True, 2], [1.0, 2], [-1, 4], [1] * 40,
    {"type": "Identity", "arguments": {}}, {"a": {"b": {"c": 1}}},
]  # fmt: skip
NAMES = [
    "../x",
    "/x",
    "",
    ".",
    "..weight",
    "0",
    "0.weight",
    "0.values",
    "5.weight",
    "0.bias",
    "\0",
    "é" * 50,
    "x" * 5000,
]
NUMBERS = [0, 1, -1, 2, 127, 2**15 - 1, -(2**15), 2**31 - 1, -(2**31)]
DTYPES = [torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64, torch.bool]


def net() -> nn.Sequential:
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5)).eval()


def ticket() -> Ticket:
    torch.manual_seed(0)
    model = net()
    masks = {f"{i}.weight": torch.rand(model[i].weight.shape) < 0.3 for i in (0, 5, 7)}
    return Ticket.from_model(convert(model, masks), {"fraction": 0.2, "layers": ["0"]})


def altered_bytes(data: bytes, random: random.Random) -> bytes:
    """Of a whole file: flips, truncations, insertions, splices, lengths of headers."""
    data, count = bytearray(data), len(data)
    for _ in range(random.choice([1, 1, 1, 2, 4, 16])):
        start = random.randrange(len(data)) if data else 0
        stop = min(len(data), start + random.choice([1, 2, 4, 8, 64, 500]))
        kind = random.randrange(7)
        if kind == 0 and data:
            data[start] ^= 1 << random.randrange(8)
        elif kind == 1:
            data[start:stop] = bytes(random.choices([0, 255, 127, 128, 1], k=stop - start))
        elif kind == 2:
            del data[start:]
        elif kind == 3:
            del data[start:stop]
        elif kind == 4:
            data[start:start] = data[stop : stop + random.randrange(50)]
        elif kind == 5:
            data[start:stop] = data[: stop - start]
        else:
            data[:8] = random.choice([0, 1, 2**32, 2**63, 2**64 - 1, count, random.randrange(count)]).to_bytes(
                8, "little"
            )
    return bytes(data)


def altered_contents(data: bytes, random: random.Random) -> bytes:
    """Of what the file says, signed again: only the checks of what it says can find that."""
    metadata, tensors = read_safetensors(data)
    head = json.loads(metadata["ticket"])
    head.pop("sha256")
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        (_alter_json if random.random() < 0.5 else _alter_tensor)(
            random, head if random.random() < 0.9 else {}, tensors
        )
    try:
        head["sha256"] = digest(head, tensors)
        text = json.dumps(head)
        if random.random() < 0.05:
            text = text.replace('"version"', '"recipe": {}, "version"')
        if random.random() < 0.05:
            text = text.replace('"fraction"', '"deep": ' + "[" * 5000 + "]" * 5000 + ', "fraction"')
        return save(
            {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
            {"ticket": text},
        )
    except UnicodeEncodeError:
        return b""


def _alter_json(random: random.Random, head: dict, _: dict) -> None:
    container, key = random.choice(list(_places(head)) or [(head, "version")])
    kind = random.randrange(4)
    if kind == 0 and isinstance(container, dict):
        container.pop(key, None)
    elif kind == 1 and isinstance(container, dict):
        container[random.choice(NAMES)] = container.get(key)
    elif kind == 2 and isinstance(container, list):
        container.append(container[key])
    else:
        container[key] = deepcopy(random.choice(VALUES))


def _places(value: object) -> Iterator[tuple[object, object]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def _alter_tensor(random: random.Random, _: dict, tensors: dict) -> None:
    name = random.choice([name for name in tensors if random.random() < 0.5 or "indices" in name] or list(tensors))
    tensor, kind = tensors[name], random.randrange(9)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[random.choice(NAMES[2:])] = tensor
    elif kind == 2:
        tensors[name] = tensor.to(random.choice(DTYPES))
    elif kind == 3:
        tensors[name] = torch.cat([tensor.reshape(-1), tensor.reshape(-1)[: random.randrange(4)]])
    elif kind == 4:
        tensors[name] = tensor.reshape(-1)[: random.randrange(tensor.numel() + 1)].clone()
    elif kind == 5:
        tensors[name] = random.choice([tensor[None], tensor.reshape(-1, 1), tensor.reshape(-1).flip(0)])
    else:
        flat = tensor.clone().reshape(-1)
        for _ in range(random.choice([1, 1, 2, 5])):
            if flat.numel():
                number = random.choice(NUMBERS) if random.random() < 0.5 else random.randrange(40)
                flat[random.randrange(flat.numel())] = torch.tensor(number).to(flat.dtype)
        tensors[name] = flat.view(tensor.shape)
