"""A pruned language model trained by Hugging Face's Trainer, saved sparse and loaded again.

python examples/huggingface_trainer.py [STEPS]
"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import sparselottery.huggingface  # noqa: F401 - lets from_pretrained load sparse models
from sparselottery import convert, prune

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200


class Counting(torch.utils.data.Dataset):
    """Texts that count upwards, from somewhere."""

    def __len__(self):
        return 80

    def __getitem__(self, start):
        tokens = torch.arange(start, start + 16)
        return {"input_ids": tokens, "labels": tokens}


config = LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config)  # or LlamaForCausalLM.from_pretrained(...)

masks = prune(model, 0.8)
del masks["lm_head.weight"]  # the output layer stays whole
sparse = convert(model, masks)

arguments = TrainingArguments(
    "trainer", max_steps=STEPS, per_device_train_batch_size=16, learning_rate=3e-3, report_to=[], use_cpu=True
)
Trainer(sparse, arguments, train_dataset=Counting()).train()

sparse.save_pretrained("sparse-llama")  # survivors only
loaded = LlamaForCausalLM.from_pretrained("sparse-llama")
text = loaded.generate(torch.arange(10, 14)[None], max_new_tokens=5, do_sample=False, pad_token_id=0)
print("after 10, 11, 12, 13:", text[0, 4:].tolist())
