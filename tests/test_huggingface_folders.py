"""What save_pretrained and from_pretrained keep of tied weights, opened modules and what models compute themselves."""

from __future__ import annotations

import pytest
import torch
from pretrained import IDS, LM, SMALL, load, pruned
from safetensors.torch import load_file
from torch import nn

from sparselottery import convert, prune, to_dense
from sparselottery.convert import masked_layers, masks_of

transformers = pytest.importorskip("transformers")


def tied_gpt2():
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    return transformers.GPT2LMHeadModel(config).eval()


def tied_bert():
    """Its head has a bias, which is tied too."""
    model = transformers.BertForMaskedLM(transformers.BertConfig(**LM)).eval()
    nn.init.normal_(model.cls.predictions.bias)
    return model


def tied_t5():
    config = transformers.T5Config(vocab_size=50, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config).eval()


def tied_gemma():
    """Its embedding has a forward and a buffer of its own."""
    config = transformers.Gemma3TextConfig(**LM, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True)
    return transformers.Gemma3ForCausalLM(config).eval()


@pytest.mark.parametrize("make", [tied_gpt2, tied_bert, tied_t5, tied_gemma])
def test_tied_weights_stay_tied(make, tmp_path):
    model = make()
    sparse = convert(model, prune(model, 0.7))
    sparse.save_pretrained(tmp_path)
    loaded, warned = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(warned.values()), warned
    given = {"input_ids": IDS, **({"decoder_input_ids": IDS} if make is tied_t5 else {})}
    assert loaded(**given).logits.equal(sparse(**given).logits)
    assert len(list(loaded.parameters())) == len(list(sparse.parameters()))
    assert loaded.get_output_embeddings().values is loaded.get_input_embeddings().values
    if make is not tied_bert:  # transformers looks for parameters of its names, by patterns
        loaded.tie_weights()
    assert loaded(**given).logits.equal(sparse(**given).logits)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(tensor.numel() for name, tensor in stored.items() if name.endswith("weight")) == sum(
        each.numel() for name, each in sparse.named_parameters() if name.endswith(("weight", "values"))
    )
    loaded.save_pretrained(tmp_path / "again")
    assert load(model, tmp_path / "again")(**given).logits.equal(sparse(**given).logits)
    dense = loaded.dequantize()
    torch.testing.assert_close(dense(**given).logits, sparse(**given).logits)
    assert dense.get_output_embeddings().weight is dense.get_input_embeddings().weight


def test_a_tied_head_that_the_folder_of_the_base_lacks(tmp_path):
    model = tied_gpt2()
    sparse = convert(model, prune(model, 0.7))
    sparse.save_pretrained(tmp_path / "whole")
    sparse.transformer.save_pretrained(tmp_path / "base")
    base = transformers.GPT2Model.from_pretrained(tmp_path / "whole").eval()
    assert base(IDS).last_hidden_state.equal(sparse.transformer(IDS).last_hidden_state)
    whole = load(sparse, tmp_path / "base")
    assert whole(IDS).logits.equal(sparse(IDS).logits)
    assert whole.lm_head.values is whole.transformer.wte.values


def test_opened_layers(tmp_path):
    config = transformers.SiglipVisionConfig(**SMALL, image_size=8, patch_size=4)
    model, images = transformers.SiglipVisionModel(config).eval(), torch.randn(2, 3, 8, 8)
    for masks in (prune(model, 0.7), prune(model, 0.7, ignore=["head.attention.in_proj_weight"])):
        sparse = convert(model, masks)
        sparse.save_pretrained(tmp_path)
        loaded, told = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(told.values()), told
        assert list(masked_layers(loaded)) == list(masked_layers(sparse))
        expected = sparse(images).pooler_output
        assert loaded(images).pooler_output.equal(expected)
        torch.testing.assert_close(loaded.dequantize()(images).pooler_output, expected)


def test_experts(tmp_path):
    config = transformers.MixtralConfig(
        **LM, num_key_value_heads=1, num_local_experts=2, experts_implementation="eager"
    )
    sparse = pruned(transformers.MixtralForCausalLM(config))
    sparse.save_pretrained(tmp_path / "masked")
    found = load(sparse, tmp_path / "masked")
    assert masks_of(found).keys() == masks_of(sparse).keys()
    expected = sparse(IDS).logits
    assert found(IDS).logits.equal(expected)
    found.save_pretrained(tmp_path / "again")
    assert load(sparse, tmp_path / "again")(IDS).logits.equal(expected)
    to_dense(found).save_pretrained(tmp_path / "dense")
    names = load_file(tmp_path / "dense" / "model.safetensors")
    assert any(".experts.1.w2" in name for name in names)  # as other programs know them
    torch.testing.assert_close(load(sparse, tmp_path / "dense")(IDS).logits, expected)
    names = [name for name in prune(sparse, 0) if "experts" not in name]
    part = convert(
        to_dense(sparse), {name: mask for name, mask in prune(to_dense(sparse), 0.7).items() if name in names}
    )
    part.save_pretrained(tmp_path)
    assert load(part, tmp_path)(IDS).logits.equal(part(IDS).logits)


def test_an_embedding_that_its_model_initialises(tmp_path):
    """Whisper's positions are sinusoids of the weight's shape, which is another in the file."""
    config = transformers.WhisperConfig(
        d_model=32, vocab_size=50, num_mel_bins=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=10, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, max_target_positions=16,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).eval()
    sparse = convert(model, prune(model, 0.7))
    sparse.save_pretrained(tmp_path)
    given = {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": IDS}
    assert load(model, tmp_path)(**given).logits.equal(sparse(**given).logits)


class Encoder(transformers.PreTrainedModel):
    """With a layer that has a fast path of dense weights, and attention that is opened."""

    config_class = transformers.PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.post_init()

    def forward(self, x):
        return self.layer(x)


def test_an_encoder_of_torch_keeps_from_its_fast_path(tmp_path):
    model = Encoder(transformers.PretrainedConfig()).eval()
    sparse, x = convert(model, prune(model, 0.7)), torch.randn(2, 3, 16)
    sparse.save_pretrained(tmp_path)
    loaded = load(sparse, tmp_path)
    assert type(loaded.layer) is type(sparse.layer)
    with torch.no_grad():
        assert loaded(x).equal(sparse(x))
    assert type(loaded.dequantize().layer) is nn.TransformerEncoderLayer
