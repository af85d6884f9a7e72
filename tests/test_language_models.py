"""Models of transformers, tiny: pruned and converted they compute, train, save and load as masked dense ones do."""

from __future__ import annotations

import copy

import pytest
import safetensors.torch
import torch
from torch import nn

from sparselottery import SparseLotteryWarning, Ticket, convert, export, load_sparse, prune, to_dense
from sparselottery.convert import masked_layers
from sparselottery.saliency import taylor
from sparselottery.survey import survey

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[5, 9, 31, 7, 40, 3, 12], [8, 8, 22, 60, 41, 1, 33]])
SMALL = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def made(name, config, **given):
    config = getattr(transformers, config)(**given)
    return getattr(transformers, name)(config)


def whisper():
    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in
             (("layers", 1), ("attention_heads", 2), ("ffn_dim", 48))}  # fmt: skip
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    sizes = {"vocab_size": 64, "d_model": 24, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16}
    return made("WhisperForConditionalGeneration", "WhisperConfig", **sides, **sizes, **tokens)


SOUND = torch.sin(torch.arange(320.0, dtype=torch.float64)).view(2, 8, 20)
IMAGES = torch.sin(torch.arange(1536.0, dtype=torch.float64)).view(2, 3, 16, 16)
EXPERTS = {"num_key_value_heads": 2, "num_local_experts": 3, "experts_implementation": "eager"}

# How the model is made, what it is given, and the least share of its weights that can be pruned.
MODELS = {
    "GPT-2": (
        lambda: made("GPT2LMHeadModel", "GPT2Config", vocab_size=64, n_positions=16, n_embd=24, n_layer=2, n_head=2),
        {"input_ids": IDS},
        1.0,
    ),
    "BERT": (lambda: made("BertForMaskedLM", "BertConfig", **SMALL), {"input_ids": IDS}, 1.0),
    "T5": (
        lambda: made("T5ForConditionalGeneration", "T5Config", vocab_size=64, d_model=24, d_kv=12, d_ff=48,
                     num_layers=2, num_heads=2),
        {"input_ids": IDS, "decoder_input_ids": IDS},
        1.0,
    ),
    "Llama": (lambda: made("LlamaForCausalLM", "LlamaConfig", **SMALL), {"input_ids": IDS}, 1.0),
    "Mixtral": (lambda: made("MixtralForCausalLM", "MixtralConfig", **SMALL, **EXPERTS), {"input_ids": IDS}, 0.98),
    "GPT-OSS": (
        lambda: made("GptOssForCausalLM", "GptOssConfig", **SMALL, **EXPERTS, head_dim=12, num_experts_per_tok=2,
                     sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
        {"input_ids": IDS},
        0.97,
    ),
    "BART": (
        lambda: made("BartForConditionalGeneration", "BartConfig", d_model=24, vocab_size=64, encoder_layers=1,
                     decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48,
                     decoder_ffn_dim=48, max_position_embeddings=16),
        {"input_ids": IDS},
        1.0,
    ),
    "OPT": (
        lambda: made("OPTForCausalLM", "OPTConfig", vocab_size=64, hidden_size=24, ffn_dim=48, num_hidden_layers=2,
                     num_attention_heads=2, word_embed_proj_dim=24),
        {"input_ids": IDS},
        1.0,
    ),
    "Gemma 3": (
        lambda: made("Gemma3ForCausalLM", "Gemma3TextConfig", **SMALL, num_key_value_heads=1, head_dim=12),
        {"input_ids": IDS},
        1.0,
    ),
    "Falcon": (lambda: made("FalconForCausalLM", "FalconConfig", **SMALL), {"input_ids": IDS}, 1.0),
    "RoFormer": (lambda: made("RoFormerForMaskedLM", "RoFormerConfig", **SMALL), {"input_ids": IDS}, 1.0),
    "ViT": (
        lambda: made("ViTForImageClassification", "ViTConfig", **(SMALL | {"image_size": 16, "patch_size": 4})),
        {"pixel_values": IMAGES},
        0.95,
    ),
    "Whisper": (whisper, {"input_features": SOUND, "decoder_input_ids": IDS}, 0.95),
}  # fmt: skip


@pytest.fixture(params=MODELS)
def case(request):
    """(model, masks, the model with zeros where pruned, inputs, least share)"""
    torch.manual_seed(0)
    make, inputs, share = MODELS[request.param]
    model = make().double().eval()
    if share < 0.9:
        with pytest.warns(SparseLotteryWarning, match="of the model's weights can be pruned"):
            masks = prune(model, 0.6)
    else:
        masks = prune(model, 0.6)
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            dense.get_parameter(name).mul_(mask)
    return model, masks, dense, inputs, share


def step(model, inputs):
    """The logits of one step of SGD, and the gradients by parameter."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logits = model(**inputs).logits
    logits.square().mean().backward()
    gradients = {
        parameter: None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()
    }
    optimizer.step()
    return logits.detach(), gradients


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_logits_and_a_step(case):
    model, masks, dense, inputs, share = case
    assert survey(model).share >= share
    converted = convert(model, masks)
    close(converted(**inputs).logits, dense(**inputs).logits)
    with torch.no_grad():
        close(converted(**inputs).logits, dense(**inputs).logits)
        close(to_dense(converted)(**inputs).logits, dense(**inputs).logits)
    (ours, our_gradients), (theirs, their_gradients) = step(converted, inputs), step(dense, inputs)
    close(ours, theirs)
    layers = masked_layers(converted)
    for name, mask in masks.items():
        layer, weight = layers[name], dense.get_parameter(name)
        close(layer.by_mask(layer.values.detach()), weight.detach()[mask])
        if weight.requires_grad:
            close(layer.by_mask(our_gradients[layer.values]), their_gradients[weight][mask])


def test_files(case, tmp_path):
    model, masks, dense, inputs, _ = case
    ticket = Ticket.from_model(convert(model, masks))
    ticket.save(tmp_path / "net.safetensors")
    loaded = Ticket.load(tmp_path / "net.safetensors")
    assert loaded.same(ticket)
    expected = dense(**inputs).logits
    close(loaded.apply(model)(**inputs).logits, expected)
    close(load_sparse(tmp_path / "net.safetensors", model)(**inputs).logits, expected)
    export(convert(model, masks), tmp_path / "dense.safetensors", format="dense")
    read = safetensors.torch.load_file(tmp_path / "dense.safetensors")
    assert all(torch.equal(read[name], dense.get_parameter(name)) for name in masks)
    assert loaded.tied == survey(model).tied
    assert loaded.density <= loaded.density_of_all


def test_a_tied_head_is_stored_once(tmp_path):
    make, inputs, _ = MODELS["GPT-2"]
    model = make().double().eval()
    masks = prune(model, 0.9)
    assert not any(name.startswith("lm_head") for name in masks)
    converted = convert(model, masks)
    assert converted.lm_head.values is converted.transformer.wte.values
    ticket = Ticket.from_model(converted)
    assert ticket.tied == {"lm_head.weight": "transformer.wte.weight"}
    assert "lm_head.weight" not in ticket.contents().dense
    given = Ticket(model.state_dict(), masks, {})
    assert given.tied == ticket.tied
    assert given.same(ticket)
    close(given.apply(model)(**inputs).logits, converted(**inputs).logits)


def test_tokens_that_are_generated():
    make, _inputs, _ = MODELS["GPT-2"]
    model = make().double().eval()
    converted = convert(model, prune(model, 0.6))
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(converted.generate(IDS, **how), to_dense(converted).generate(IDS, **how))


def test_scores_of_a_transposed_layer_are_in_the_order_of_its_mask():
    model = transformers.pytorch_utils.Conv1D(5, 7).double()
    mask, x = torch.rand(7, 5) < 0.4, torch.randn(3, 7, dtype=torch.float64)
    converted = convert(model, {"weight": mask})
    scores = taylor(converted, [x], lambda model, x: model(x).square().sum())["weight"]
    dense = taylor(to_dense(converted), [x], lambda model, x: model(x).square().sum())["weight"]
    close(scores, dense[mask])
    weight = converted.weight
    assert weight.shape == (7, 5)
    close(weight.detach() * 2, to_dense(converted).weight.detach() * 2)
    converted(x).sum().backward()
    assert torch.equal(weight.grad != 0, mask)
    with torch.no_grad():
        converted.weight = 3 * to_dense(converted).weight.detach()
    close(converted(x), 3 * (to_dense(convert(model, {"weight": mask}))(x) - model.bias) + model.bias)
    assert "execution=sparse" in repr(converted)


def test_experts_without_gates():
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    config = transformers.NemotronHConfig(
        hidden_size=24, moe_intermediate_size=16, n_routed_experts=3, experts_implementation="eager"
    )
    torch.manual_seed(0)
    dense = nn.Sequential(NemotronHExperts(config)).double()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.normal_()
    masks = prune(dense, 0.6)
    masked = convert(dense, masks)
    with torch.no_grad():
        for name, mask in masks.items():
            dense.get_parameter(name).mul_(mask)
    x, numbers = torch.randn(5, 24).double(), torch.tensor([[0, 1], [2, 1], [0, 2], [0, 1], [2, 0]])
    shares = torch.rand(5, 2).double()
    close(masked[0](x, numbers, shares), dense[0](x, numbers, shares))
