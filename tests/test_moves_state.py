"""set_masks: counts of an optimiser, and averages of the model."""

from __future__ import annotations

import torch
from moving import X, assert_same, layers, masked_net, random_masks, reference, same_count, train

from sparselottery import set_masks
from sparselottery.convert import dense_state, masks_of


def test_what_a_captured_step_counts_stays_the_same_tensor():
    model = masked_net(random_masks(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True)
    train(model, optimizer, 3)
    optimizer.param_groups[0]["capturable"] = True  # which torch runs on a GPU alone
    kept = {values: state["step"] for values, state in optimizer.state.items()}
    moments = {values: state["exp_avg"].clone() for values, state in optimizer.state.items()}
    masks = {name: mask & (torch.arange(mask.numel()) < 2).view(mask.shape) for name, mask in random_masks(1).items()}
    masks["5.weight"][:] = False
    masks["5.weight"][0, 0] = True  # a single weight, whose moments are as long as the count
    set_masks(model, masks, optimizer)
    for layer in layers(model):
        state = optimizer.state[layer.values]
        assert state["step"] is kept[layer.values]
        assert float(state["step"]) == 3
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == layer.values.shape
    assert model[5].nnz == 1
    assert bool(model[5].bias in optimizer.state)
    assert torch.equal(optimizer.state[model[5].bias]["exp_avg"], moments[model[5].bias])


def test_an_average_of_equally_many_survivors_follows():
    model = masked_net(same_count(0))
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer)
    average.update_parameters(model)
    for number in (1, 2):
        set_masks(model, same_count(number), optimizer)
        set_masks(average.module, same_count(number))
        train(model, optimizer)
        before = dense_state(average.module)
        average.update_parameters(model)
        assert_same(masks_of(average.module), masks_of(model))
        for name, entry in dense_state(average.module).items():
            share = 1 / int(average.n_averaged)
            torch.testing.assert_close(entry, before[name] + share * (dense_state(model)[name] - before[name]))
        torch.testing.assert_close(average(X), reference(average.module)(X))
