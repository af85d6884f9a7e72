"""Gradual pruning while Lightning's Trainer trains: from all weights to a tenth.

python examples/lightning_pruning.py [STEPS]
"""

import sys
from functools import partial

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparselottery import convert, dynamic, prune
from sparselottery.callbacks import MovingMasks

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 400


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2))
        self.net = convert(net, prune(net, 0.0))  # masked layers, in which nothing is pruned yet

    def training_step(self, batch, _):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


torch.manual_seed(0)
x = torch.randn(2000, 64)
y = (x[:, :8].sum(1) > 0).long()

module = Classifier()
pruning = MovingMasks(partial(dynamic.gmp, density=0.1, end=STEPS * 3 // 4, every=max(1, STEPS // 20)))
trainer = Trainer(max_steps=STEPS, callbacks=[pruning], accelerator="cpu", logger=False, enable_checkpointing=False,
                  enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True))

survivors = sum(layer.nnz for layer in module.net if hasattr(layer, "nnz"))
with torch.no_grad():
    accuracy = (module.net(x).argmax(1) == y).float().mean()
print(f"{survivors:,} weights are left, accuracy {accuracy:.3f}")
