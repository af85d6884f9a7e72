"""Lightning: masks move at the optimiser's steps, and a training goes on from a checkpoint as if it had not stopped."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from sparselottery import convert, dynamic, prune
from sparselottery.convert import masked_layers

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, of loggers, workers and its own deprecations
lightning = pytest.importorskip("lightning.pytorch")
X = torch.randn(4, 20).repeat(8, 1)  # equal batches: where Lightning goes on in an epoch is its own affair


class Module(lightning.LightningModule):
    def __init__(self, optimizers=1):
        super().__init__()
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 2))
        self.net, self.optimizers_wanted = convert(net, prune(net, 0.0)), optimizers
        self.densities = []

    def training_step(self, batch, _):
        self.densities.append(sum(layer.nnz for layer in masked_layers(self.net).values()) / 880)
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return [torch.optim.Adam(self.parameters(), lr=1e-2) for _ in range(self.optimizers_wanted)]


def fit(module, folder, steps, ckpt_path=None, method=None, **options):
    from sparselottery.callbacks import MovingMasks

    masks = MovingMasks(method or partial(dynamic.gmp, density=0.1, end=8, every=2))
    how = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_steps=steps, callbacks=[masks], default_root_dir=folder,
                                enable_checkpointing=False, **how, **options)  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(X, batch_size=4), ckpt_path=ckpt_path)
    return trainer, masks


def test_it_prunes_on_schedule(tmp_path):
    module = Module()
    _, masks = fit(module, tmp_path, 8)
    assert module.densities[0] == 1
    assert module.densities == sorted(module.densities, reverse=True)
    assert [layer.nnz for layer in masked_layers(module.net).values()] == [80, 8]
    assert masks.updater.steps == 8


def test_it_counts_steps_of_the_optimiser(tmp_path):
    _, masks = fit(Module(), tmp_path, 3, accumulate_grad_batches=2)
    assert masks.updater.steps == 3


@pytest.mark.parametrize(
    "method",
    [
        partial(dynamic.gmp, density=0.2),
        partial(dynamic.rigl, density=0.2),
        partial(dynamic.single_cycle, density=0.9, initial=0.3),  # which begins sparser than it goes on
    ],
)
def test_it_goes_on_from_a_checkpoint(tmp_path, method):
    method = partial(method, end=8, every=2)
    straight = Module()
    fit(straight, tmp_path, 8, method=method)
    trainer, _ = fit(Module(), tmp_path, 5, method=method)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Module()
    _, masks = fit(resumed, tmp_path, 8, ckpt_path=tmp_path / "half.ckpt", method=method)
    assert masks.updater.steps == 8
    assert resumed.densities == straight.densities[5:]
    for name, layer in masked_layers(straight.net).items():
        again = masked_layers(resumed.net)[name]
        assert torch.equal(again.mask, layer.mask)
        torch.testing.assert_close(again.values, layer.values)


def test_one_optimiser(tmp_path):
    module = Module(optimizers=2)
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="optimizers: expected one, got 2"):
        fit(module, tmp_path, 1)
