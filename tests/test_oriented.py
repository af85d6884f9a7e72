"""Whose outputs and inputs the blocks of a model's layers are, and which rows of them stay."""

from __future__ import annotations

import pytest
import torch
from blocks import is_blocky
from torch import nn

from sparselottery import convert, find_ticket, prune
from sparselottery.nn.experts import Matrices
from sparselottery.pattern import block_of
from sparselottery.pieces import count


def no_training(model):
    return None


def rows_left(masks):
    return [int(mask.flatten(1).any(1).sum()) for mask in masks.values()]


def test_rows_compete_with_those_of_their_length():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8), nn.Conv1d(8, 4, 3), nn.Linear(4, 2))
    for layer, size in zip(model, (1.0, 0.1, 0.01, 1.0), strict=True):
        nn.init.constant_(layer.weight, size)
    masks = prune(model, 0.5, scope="global", granularity="rows")
    assert rows_left(masks) == [4, 2, 2, 2]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_the_last_row_of_a_layer_stays(scope, method):
    model = nn.Sequential(nn.Linear(3, 1), nn.Linear(3, 2), nn.Linear(3, 4), nn.Linear(7, 2))
    for layer in model:
        nn.init.constant_(layer.weight, len(layer.weight))
    model[2].weight.data[1] = 9
    masks = prune(model, 0.9, scope=scope, method=method, granularity="rows")
    assert rows_left(masks) == [1, 1, 1, 2]
    assert masks["2.weight"][1].all() or method == "random"
    assert rows_left(prune(model, 0.9, masks, scope=scope, method=method, granularity="rows")) == [1, 1, 1, 2]


def test_rows_leave_the_outputs_of_the_model_whole_unless_told_otherwise():
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 4))
    assert rows_left(prune(model, 0.5, granularity="rows")) == [4, 4]
    for told in ({"output_fraction": 0.25}, {"rates": {"1.*": 0.25}}):
        assert rows_left(prune(model, 0.5, granularity="rows", **told)) == [4, 3]
    assert rows_left(prune(model, 0.5, granularity={"*": "rows"})) == [4, 2]
    assert rows_left(prune(nn.Linear(3, 8), 0.5, granularity="rows")) == [4]


def transposed_linear():
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D(12, 8)
    return conv1d, nn.Linear(8, 12), torch.t


def transposed_convolution():
    def turned(dense):  # (6, 5, 3, 2) in two groups as (10, 3, 3, 2)
        return torch.cat([group.transpose(0, 1) for group in dense.split(3)])

    return nn.ConvTranspose2d(6, 10, (3, 2), groups=2), nn.Conv2d(6, 10, (3, 2), groups=2), turned


HOLDERS = [transposed_linear, transposed_convolution]


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize(
    ("granularity", "permute"), [((4, 2), False), ((5, 1), False), ("1:2", False), ("rows", False), ((2, 2), True)]
)
@pytest.mark.parametrize("given", ["magnitudes", "scores", "random"])
def test_blocks_are_of_outputs_and_inputs_however_a_layer_holds_them(holder, granularity, permute, given):
    torch.manual_seed(0)
    layer, plain, turned = holder()
    plain.weight = nn.Parameter(turned(layer.weight.detach()).contiguous())
    how, scores = {"granularity": granularity, "permute": permute}, torch.rand(layer.weight.shape)

    def pruned(model, scores, masks):
        more = {"scores": {"weight": scores}} if given == "scores" else {}
        if given == "random":
            more = {"method": "random", "generator": torch.Generator().manual_seed(1)}
        return prune(model, 0.5, masks, **how, **more)

    masks, expected = pruned(layer, scores, None), pruned(plain, turned(scores), None)
    assert torch.equal(turned(masks["weight"]), expected["weight"])
    assert 0 < count(masks["weight"]) < scores.numel()
    if granularity != "1:2":  # what survives is pruned again, by scores of the survivors alone
        again = pruned(layer, scores[masks["weight"]], masks), pruned(plain, turned(scores), expected)
        assert torch.equal(turned(again[0]["weight"]), again[1]["weight"])
        assert count(again[0]["weight"]) < count(masks["weight"])
    assert torch.equal(convert(layer, masks).mask, masks["weight"])


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_ticket_of_such_layers(holder):
    torch.manual_seed(0)
    layer, plain, turned = holder()
    plain.weight = nn.Parameter(turned(layer.weight.detach()).contiguous())
    tickets = [find_ticket(each, no_training, rounds=2, fraction=0.4, granularity=(4, 2)) for each in (layer, plain)]
    assert torch.equal(turned(tickets[0].masks["weight"]), tickets[1].masks["weight"])
    assert is_blocky(turned(tickets[0].masks["weight"]), (4, 2))


def test_blocks_of_transposed_layers_are_blocks_of_the_pattern():
    layer = pytest.importorskip("transformers").pytorch_utils.Conv1D(64, 40)
    converted = convert(layer, prune(layer, 0.5, granularity=(16, 1)))
    assert block_of(converted.pattern, converted.shape) == (16, 1)


@pytest.mark.parametrize("inputs_first", [False, True])
def test_blocks_and_rows_are_of_one_expert(inputs_first):
    torch.manual_seed(0)
    experts = Matrices(3, 7, 5, inputs_first)
    nn.init.normal_(experts.weight)

    def prune_turned(*args, **kwargs):
        mask = prune(experts, *args, **kwargs)["weight"]
        return mask.mT if inputs_first else mask

    mask = prune_turned(0.5, granularity=(4, 2))
    assert all(is_blocky(each, (4, 2)) for each in mask)
    assert sum(len({(r // 4, c // 2) for r, c in each.nonzero().tolist()}) for each in mask) == 9
    experts.weight.data[1] += 9
    rows = prune_turned(10 / 21, granularity="rows")
    assert torch.equal(rows.all(2), rows.any(2))
    assert rows[1].all()
    assert rows.any(2).sum() == 11
    assert (prune_turned(0.5, granularity="1:2").sum(2) == 3).all()


@pytest.mark.parametrize("embedding", [nn.Embedding(8, 4), nn.EmbeddingBag(8, 4)])
def test_words_are_no_rows(embedding):
    model = nn.ModuleDict({"words": embedding, "fc": nn.Linear(4, 4), "head": nn.Linear(4, 8)})
    message = r"granularity: expected blocks or N:M of the embedding 'words\.weight', whose rows are words, got 'rows'"
    for each in (model, convert(model, prune(model, 0))):
        with pytest.raises(ValueError, match=message):
            prune(each, 0.5, granularity="rows")
        assert rows_left(prune(each, 0.5, granularity="rows", ignore=["words.*"])) == [8, 2, 8]
        assert is_blocky(prune(each, 0.5, granularity=(2, 2))["words.weight"], (2, 2))
    tied = nn.ModuleDict({"head": nn.Linear(4, 8, bias=False), "words": nn.Embedding(8, 4), "fc": nn.Linear(4, 4)})
    tied["words"].weight = tied["head"].weight
    with pytest.raises(ValueError, match=r"of the embedding 'head\.weight'"):
        find_ticket(tied, pytest.fail, rounds=1, granularity="rows")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(6, 10, 3), nn.ReLU(), nn.Flatten(), nn.Linear(40, 12), nn.ReLU(), nn.Linear(12, 3))


@pytest.mark.parametrize("permute", [False, True])
def test_blocks_that_are_no_smaller_than_a_layer_are_refused(permute):
    message = r"granularity: expected blocks smaller than '5\.weight', which is 3x12, got 1000x1000"
    how = {"granularity": {"5.*": (1000, 1000)}, "permute": permute}
    with pytest.raises(ValueError, match=message):
        prune(net(), 0.5, **how)
    with pytest.raises(ValueError, match=message):
        find_ticket(net(), pytest.fail, rounds=1, **how)
    assert prune(net(), 0.5, ignore=["5.*"], **how)["5.weight"].all()
    assert prune(net(), 0.5, granularity={"0.*": (1000, 1000)}, permute=permute)["0.weight"].sum() == 300  # 5 taps of 9
