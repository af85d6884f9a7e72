"""A lottery ticket of a LightningModule: every round of pruning is a `fit` of its own, with a Trainer of its own.

A callback lives within one `fit`, where the learning rate, the data and the optimiser go on; a round begins all of them
anew, from the initial weights. So rounds are around the Trainer, and `find_ticket` is what goes through them.

python examples/lightning_ticket.py [STEPS]
"""

import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparselottery import find_ticket

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2))

    def training_step(self, batch, _):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


torch.manual_seed(0)
x = torch.randn(2000, 64)
y = (x[:, :8].sum(1) > 0).long()
batches = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)


def train(module):
    """Of a copy of the module, its layers masked; what it returns is kept with the round."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(max_steps=STEPS, accelerator="cpu", enable_checkpointing=False, **quiet).fit(module, batches)
    with torch.no_grad():
        return {"accuracy": (module.net(x).argmax(1) == y).float().mean().item()}


def told(record):
    print(f"round {record['round']}: {record['density']:.1%} of the weights, accuracy {record['accuracy']:.3f}")


ticket = find_ticket(Classifier(), train, rounds=3, fraction=0.5, on_round=told)
ticket.save("ticket.safetensors")
