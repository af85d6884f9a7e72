"""Architectures that people bring, tiny and with random weights: (maker, inputs) by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Made = tuple[nn.Module, dict[str, Any]]

TOKENS = torch.tensor([[5, 9, 31, 7, 40, 3, 12], [8, 8, 22, 60, 41, 11, 33]])
SMALL = {
    "vocab_size": 64, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 1, "head_dim": 12, "pad_token_id": 0}
VISION = {name: size for name, size in SMALL.items() if name != "vocab_size"} | {"image_size": 16, "patch_size": 4}
SEQUENCES = {"d_model": 24, "vocab_size": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}  # fmt: skip
EAGER = {"experts_implementation": "eager"}  # the others multiply all experts in one call of a fused kernel


def waves(*shape: int) -> Tensor:
    return torch.sin(torch.arange(float(torch.Size(shape).numel()), dtype=torch.float64)).view(shape)


TEXT = {"input_ids": TOKENS}
PAIRED = {"input_ids": TOKENS, "decoder_input_ids": TOKENS}
IMAGES = {"pixel_values": waves(2, 3, 16, 16)}
LARGE = {"pixel_values": waves(2, 3, 64, 64)}
SOUND = {"input_values": waves(2, 800)}
MELS = {"input_features": waves(2, 8, 20), "decoder_input_ids": TOKENS}


def of_transformers(model: str, config: str, inputs: dict[str, Any], **given: Any) -> Made:
    settings = getattr(transformers, config)(**given)
    settings.use_cache = False  # what a net returns then is tensors, which exports can hold
    return getattr(transformers, model)(settings), inputs


def of_torch(make: Callable[[], nn.Module], *inputs: Tensor) -> Made:
    return make(), {f"_{number}": each for number, each in enumerate(inputs)}


class Recurrent(nn.Module):
    """An embedding, an LSTM and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.lstm, self.head = nn.Embedding(64, 16), nn.LSTM(16, 24, batch_first=True), nn.Linear(24, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.words(tokens))[0])


def autoencoder() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 3, 4, 2, 1))


def u_net_of_volumes() -> nn.Module:
    return nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.ConvTranspose3d(4, 1, 2, 2))


def audio_net() -> nn.Module:
    return nn.Sequential(nn.Conv1d(8, 16, 5, 2, 2), nn.GELU(), nn.ConvTranspose1d(16, 8, 4, 2, 1))


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 2, 48, batch_first=True), 2, enable_nested_tensor=False)


def text(model: str, config: str, **given: Any) -> Callable[[], Made]:
    return partial(of_transformers, model, config, TEXT, **given)


def images(model: str, config: str, **given: Any) -> Callable[[], Made]:
    return partial(of_transformers, model, config, IMAGES, **given)


def pairs(model: str, config: str, **given: Any) -> Callable[[], Made]:
    return partial(of_transformers, model, config, PAIRED, **given)


CASES: dict[str, Callable[[], Made]] = {
    "ALBERT": text("AlbertForMaskedLM", "AlbertConfig", **SMALL, embedding_size=16),
    "BART": pairs("BartForConditionalGeneration", "BartConfig", **SEQUENCES, max_position_embeddings=16),
    "BERT": text("BertForMaskedLM", "BertConfig", **SMALL),
    "BLOOM": text("BloomForCausalLM", "BloomConfig", vocab_size=64, hidden_size=24, n_layer=2, n_head=2),
    "Cohere": text("CohereForCausalLM", "CohereConfig", **GROUPED),
    "DeBERTa v2": text("DebertaV2ForMaskedLM", "DebertaV2Config", **SMALL),
    "DistilBERT": text("DistilBertForMaskedLM", "DistilBertConfig", vocab_size=64, dim=24, hidden_dim=48, n_layers=2,
                       n_heads=2),
    "ELECTRA": text("ElectraForMaskedLM", "ElectraConfig", **SMALL, embedding_size=16),
    "Falcon": text("FalconForCausalLM", "FalconConfig", **SMALL),
    "Funnel": text("FunnelForMaskedLM", "FunnelConfig", vocab_size=64, block_sizes=[1, 1], d_model=24, n_head=2,
                   d_head=12, d_inner=48),
    "Gemma 2": text("Gemma2ForCausalLM", "Gemma2Config", **GROUPED),
    "Gemma 3": text("Gemma3ForCausalLM", "Gemma3TextConfig", **GROUPED),
    "GPT-2": text("GPT2LMHeadModel", "GPT2Config", vocab_size=64, n_positions=16, n_embd=24, n_layer=2, n_head=2),
    "GPT-J": text("GPTJForCausalLM", "GPTJConfig", vocab_size=64, n_positions=16, n_embd=24, n_layer=2, n_head=2,
                  rotary_dim=4),
    "GPT-Neo": text("GPTNeoForCausalLM", "GPTNeoConfig", vocab_size=64, hidden_size=24, num_layers=2, num_heads=2,
                    attention_types=[[["global"], 2]], max_position_embeddings=16),
    "GPT-NeoX": text("GPTNeoXForCausalLM", "GPTNeoXConfig", **SMALL),
    "GPT-OSS": text("GptOssForCausalLM", "GptOssConfig", **GROUPED, **EAGER, num_local_experts=3,
                    num_experts_per_tok=2, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    "Granite": text("GraniteForCausalLM", "GraniteConfig", **GROUPED),
    "Llama": text("LlamaForCausalLM", "LlamaConfig", **GROUPED),
    "Mamba": text("MambaForCausalLM", "MambaConfig", vocab_size=64, hidden_size=24, num_hidden_layers=2, state_size=4),
    "MarianMT": pairs("MarianMTModel", "MarianConfig", **SEQUENCES, pad_token_id=0, max_position_embeddings=16),
    "Mistral": text("MistralForCausalLM", "MistralConfig", **GROUPED),
    "Mixtral": text("MixtralForCausalLM", "MixtralConfig", **GROUPED, **EAGER, num_local_experts=3),
    "MobileBERT": text("MobileBertForMaskedLM", "MobileBertConfig", **SMALL, embedding_size=24,
                       intra_bottleneck_size=24, true_hidden_size=24),
    "MPNet": text("MPNetForMaskedLM", "MPNetConfig", **SMALL),
    "MPT": text("MptForCausalLM", "MptConfig", vocab_size=64, d_model=24, n_heads=2, n_layers=2, max_seq_len=16),
    "Nemotron": text("NemotronForCausalLM", "NemotronConfig", **GROUPED),
    "OLMo 2": text("Olmo2ForCausalLM", "Olmo2Config", **GROUPED),
    "OPT": text("OPTForCausalLM", "OPTConfig", vocab_size=64, hidden_size=24, ffn_dim=48, num_hidden_layers=2,
                num_attention_heads=2, word_embed_proj_dim=24),
    "Pegasus": pairs("PegasusForConditionalGeneration", "PegasusConfig", **SEQUENCES, max_position_embeddings=16),
    "Phi": text("PhiForCausalLM", "PhiConfig", **SMALL),
    "Phi-3": text("Phi3ForCausalLM", "Phi3Config", **SMALL, num_key_value_heads=1, pad_token_id=0),
    "Qwen 2": text("Qwen2ForCausalLM", "Qwen2Config", **SMALL, num_key_value_heads=1),
    "Qwen 2 MoE": text("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **SMALL, **EAGER, num_key_value_heads=1,
                       num_experts_per_tok=2, num_experts=3, moe_intermediate_size=16,
                       shared_expert_intermediate_size=24),
    "Qwen 3": text("Qwen3ForCausalLM", "Qwen3Config", **GROUPED),
    "RoBERTa": text("RobertaForMaskedLM", "RobertaConfig", **SMALL),
    "RoFormer": text("RoFormerForMaskedLM", "RoFormerConfig", **SMALL),
    "StableLM": text("StableLmForCausalLM", "StableLmConfig", **SMALL, num_key_value_heads=1,
                     partial_rotary_factor=0.5),
    "StarCoder 2": text("Starcoder2ForCausalLM", "Starcoder2Config", **SMALL, num_key_value_heads=1),
    "T5": pairs("T5ForConditionalGeneration", "T5Config", vocab_size=64, d_model=24, d_kv=12, d_ff=48, num_layers=2,
                num_heads=2),
    "XLNet": text("XLNetLMHeadModel", "XLNetConfig", vocab_size=64, d_model=24, n_layer=2, n_head=2, d_inner=48),
    "BEiT": images("BeitForImageClassification", "BeitConfig", **VISION),
    "ConvNeXt": partial(of_transformers, "ConvNextForImageClassification", "ConvNextConfig", LARGE,
                        hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]),
    "DeiT": images("DeiTForImageClassification", "DeiTConfig", **VISION),
    "DINOv2": images("Dinov2ForImageClassification", "Dinov2Config", **VISION),
    "MobileNet v2": partial(of_transformers, "MobileNetV2ForImageClassification", "MobileNetV2Config", LARGE,
                            depth_multiplier=0.35),
    "ResNet": partial(of_transformers, "ResNetForImageClassification", "ResNetConfig", LARGE, embedding_size=8,
                      hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]),
    "SegFormer": partial(of_transformers, "SegformerForImageClassification", "SegformerConfig", LARGE,
                         hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2]),
    "Swin": partial(of_transformers, "SwinForImageClassification", "SwinConfig", LARGE, image_size=64, patch_size=4,
                    embed_dim=12, depths=[1, 1], num_heads=[1, 2], window_size=4),
    "ViT": images("ViTForImageClassification", "ViTConfig", **VISION),
    "HuBERT": partial(of_transformers, "HubertForCTC", "HubertConfig", SOUND, **SMALL, conv_dim=[16, 16],
                      conv_stride=[5, 4], conv_kernel=[10, 8], num_conv_pos_embeddings=8,
                      num_conv_pos_embedding_groups=2, num_feat_extract_layers=2),
    "Wav2Vec2": partial(of_transformers, "Wav2Vec2ForCTC", "Wav2Vec2Config", SOUND, **SMALL, conv_dim=[16, 16],
                        conv_stride=[5, 4], conv_kernel=[10, 8], num_conv_pos_embeddings=8,
                        num_conv_pos_embedding_groups=2, num_feat_extract_layers=2),
    "Whisper": partial(of_transformers, "WhisperForConditionalGeneration", "WhisperConfig", MELS, **SEQUENCES,
                       num_mel_bins=8, max_source_positions=10, max_target_positions=16, pad_token_id=0,
                       bos_token_id=1, eos_token_id=2, decoder_start_token_id=1),
    "torch TransformerEncoder": partial(of_torch, encoder, waves(2, 7, 24)),
    "torch LSTM": partial(of_torch, Recurrent, TOKENS),
    "torch autoencoder": partial(of_torch, autoencoder, waves(2, 3, 16, 16)),
    "torch volumes": partial(of_torch, u_net_of_volumes, waves(2, 1, 4, 6, 6)),
    "torch audio": partial(of_torch, audio_net, waves(2, 8, 32)),
}  # fmt: skip
