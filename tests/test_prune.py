import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from sparselottery import SparseLotteryWarning, convert, find_ticket
from sparselottery.convert import masks_of
from sparselottery.masks import survivors
from sparselottery.pruning import prune


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))


def test_prune_takes_its_masks_from_the_model():
    model = net()
    masks = prune(model, 0.5)
    assert {name: survivors({name: mask}) for name, mask in masks.items()} == {"0.weight": 48, "3.weight": 18}
    converted = convert(model, masks)
    again = prune(converted, 0.5)
    assert survivors(again) == 33
    assert all(not (again[name] & ~mask).any() for name, mask in masks.items())
    assert all(torch.equal(again[name], mask) for name, mask in prune(model, 0.5, masks).items())
    assert all(torch.equal(mask, masks[name]) for name, mask in masks_of(converted).items())


def test_prune_of_a_layer_that_is_not_in_the_masks():
    masks = prune(net(), 0.5, {"0.weight": torch.zeros(12, 8, dtype=torch.bool)})
    assert [survivors({name: mask}) for name, mask in masks.items()] == [0, 18]


def test_prune_passes_its_arguments_on():
    model = net()
    masks = prune(model, 0.5, rates={"0.*": 0.25}, output_fraction=0.75)
    assert [survivors({name: mask}) for name, mask in masks.items()] == [72, 9]
    assert survivors(prune(model, 0.5, ignore=["0.weight"])) == 96 + 18
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    masks = prune(model, 90 / 132, scope="global")
    assert [survivors({name: mask}) for name, mask in masks.items()] == [6, 36]


def test_prune_at_random_ignores_the_weights_and_follows_the_generator():
    first, second = (prune(net(n), 0.5, method="random", generator=torch.Generator().manual_seed(7)) for n in (0, 1))
    assert all(torch.equal(second[name], mask) for name, mask in first.items())
    assert [survivors({name: mask}) for name, mask in first.items()] == [48, 18]
    assert not torch.equal(first["0.weight"], prune(net(), 0.5)["0.weight"])


def test_layers_of_which_a_fraction_is_no_weight_are_told():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 1, bias=False), nn.Linear(1, 2))
    told = r"nothing is pruned where .* weight or block: 0\.2 of the 2 of 2\.weight\. scope="
    with pytest.warns(SparseLotteryWarning, match=told) as warned:
        masks = prune(model, 0.2)
    assert warned[0].filename == __file__
    assert [survivors({name: mask}) for name, mask in masks.items()] == [19, 5, 2]
    with pytest.warns(SparseLotteryWarning, match=told):
        find_ticket(model, lambda model: None, rounds=0)
    with pytest.warns(SparseLotteryWarning, match="0.2 of the 2 of 0.weight; 0.2 of the 2 of 1.weight; "):
        prune(model, 0.2, granularity={"0.*": (3, 4), "1.*": (1, 4)})
    prune(model, 0.2, scope="global")
    prune(model, 0.2, ignore=["2.weight"])
    prune(model, 0.2, granularity="rows", rates={"1.*": 0})
    masks["2.weight"][0] = False  # what has been pruned goes on as it does
    prune(model, 0.2, masks)


def test_layers_that_are_emptied_are_told():
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    with pytest.warns(SparseLotteryWarning, match=r"no weight is left of 0\.weight: .* scope='layer'") as warned:
        masks = prune(model, 96 / 132, scope="global")
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert [survivors({name: mask}) for name, mask in masks.items()] == [0, 36]
    prune(model, 0.5, masks, scope="global")  # it was empty before
    with pytest.warns(SparseLotteryWarning, match=r"no weight is left of 0\.weight, 3\.weight: "):
        prune(model, 0.5, rates={"*": 0.999})


@pytest.mark.filterwarnings("ignore:nothing is pruned", "ignore:no weight is left")
@settings(deadline=None)
@given(st.lists(st.floats(0, 1, exclude_max=True), max_size=6))
def test_a_pruned_weight_never_returns(fractions):
    model, masks = net(), None
    for fraction in fractions:
        pruned = prune(model, fraction, masks)
        if masks is not None:
            assert all(not (pruned[name] & ~mask).any() for name, mask in masks.items())
        masks = pruned


@pytest.mark.parametrize(
    ("model", "arguments", "error", "message"),
    [
        (nn.ReLU(), {}, ValueError, "model: expected at least one layer that can be masked"),
        (net(), {"method": "hessian"}, ValueError, "method: expected one of .*'hessian'"),
        (net(), {"scope": "row"}, ValueError, "scope: expected one of .*'row'"),
        (net(), {"fraction": 1}, ValueError, "fraction: expected"),
        (net(), {"rates": [0.5]}, TypeError, "rates: expected a dict of fractions by name, got list"),
        (net(), {"rates": {0: 0.5}}, TypeError, "rates: expected names of parameters, as '0.weight' is, got 0"),
        (net(), {"ignore": [0]}, TypeError, "ignore: expected names of parameters, as '0.weight' is, got 0"),
        (nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2)), {}, ValueError, "the lazy '0.weight': call the model once"),
        (net(), {"masks": {"0.weight": torch.ones(12, 8)}}, TypeError, "expected a bool tensor"),
        (net(), {"masks": {"0.weight": torch.ones(8, 12) > 0}}, ValueError, r"expected shape \(12, 8\), got \(8, 12\)"),
        (net(), {"masks": {"9.weight": torch.ones(8, 12) > 0}}, ValueError, r"expected names among .*got '9\.weight'"),
    ],
)
def test_prune_refuses(model, arguments, error, message):
    with pytest.raises(error, match=message):
        prune(model, **{"fraction": 0.2, **arguments})


def test_prune_of_what_is_no_model_or_has_no_data():
    with pytest.raises(TypeError, match=r"model: expected an nn.Module, got str"):
        prune("x", 0.2)
    with pytest.raises(ValueError, match=r"model: expected weights with data, got those of '0.weight' on"):
        prune(nn.Sequential(nn.Linear(4, 3, device="meta")), 0.2)
    with pytest.raises(TypeError, match="masks: expected a dict of masks by parameter name, got list"):
        prune(nn.Sequential(nn.Linear(4, 3)), 0.2, [])
