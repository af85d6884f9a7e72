"""A lottery ticket in a plain PyTorch loop: find it, train it sparse, save it, run it.

python examples/plain_pytorch.py [STEPS]
"""

import sys

import torch
from torch import nn

from sparselottery import export, find_ticket, load_sparse

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 300

torch.manual_seed(0)
x = torch.randn(2000, 64)
y = (x[:, :8].sum(1) > 0).long()  # what the net has to learn: the sign of a sum of eight inputs


def train(model):
    """Any loop that trains the model in place. What it returns is kept with the round."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(STEPS):
        batch = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        return {"accuracy": (model(x).argmax(1) == y).float().mean()}


def show(record):
    print(f"round {record['round']}: {record['density']:.0%} of the weights, accuracy {record['accuracy']:.3f}")


model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2))
ticket = find_ticket(model, train, rounds=5, fraction=0.4, on_round=show)

sparse = ticket.apply(model)  # the survivors at their initial weights
train(sparse)  # a step computes, and an optimiser keeps, the survivors only
export(sparse.eval(), "ticket.safetensors", format="safetensors")

net = load_sparse("ticket.safetensors")  # frozen, for inference
print("of the first five:", net(x[:5]).argmax(1).tolist(), "expected:", y[:5].tolist())
