"""Small models of transformers, converted, saved and loaded."""

from __future__ import annotations

import pytest
import torch

from sparselottery import convert, prune

transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
LM = {**SMALL, "vocab_size": 50, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
HEADS = ("lm_head", "embed_out")
EMBEDDING = "model.embed_tokens"
IDS = torch.randint(3, 50, (2, 6))


def llama():
    config = transformers.LlamaConfig(num_key_value_heads=2, **LM)
    return transformers.LlamaForCausalLM(config).eval()


def neox():
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**LM)).eval()


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**LM)).eval()


def pruned(model, fraction=0.7, ignore=HEADS):
    masks = prune(model, fraction)
    return convert(model, {name: mask for name, mask in masks.items() if not name.startswith(ignore)})


def load(model, folder, **options):
    return type(model).from_pretrained(folder, **options).eval()


def gpt2():
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=32,
                                     tie_word_embeddings=False)  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()
