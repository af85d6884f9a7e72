"""Whole models of transformers with random weights, 90 % of every layer pruned, against the best of dense.

GPT-2 small writes 64 tokens after 16, one at a time, its head tied to its embedding and masked too; ViT-B/16 and the
encoder of Whisper-tiny are called once. `dense` has zeros where weights are pruned, `dense_compiled` is the same by
inductor, for one call with its weights packed, for GPT-2 with a cache of fixed size, as code for a growing one is
compiled anew.
"""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.test_bench_conv_net import frozen
from benchmarks.timing import Candidate
from sparselottery import convert, prune, to_dense

DENSITY = 0.1  # of every layer
TOLERANCE = 1e-4
PROMPT, TOKENS = 16, 64
CONVERT_MS = 10_000  # that `convert` may take
INDUCTOR = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


@INDUCTOR
def test_generate(measure, rows):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    prompt = torch.randint(model.config.vocab_size, (1, PROMPT))
    case = {"net": "gpt-2", "op": "generate", "batch": 1, "density": DENSITY}
    masks = prune(model, 1 - DENSITY, method="random")
    start = time.perf_counter()
    sparse = convert(model, masks, {"input_ids": prompt[:, :1]})
    ms = 1e3 * (time.perf_counter() - start)
    models = {"sparselottery": sparse, "dense": to_dense(sparse)}
    candidates = {name: generation(each, prompt) for name, each in models.items()}
    if peers.COMPILER_MISSING is None:
        compiled = transformers.CompileConfig(mode=None)
        compiled._compile_all_devices = True  # else on GPUs alone
        static = {"cache_implementation": "static", "compile_config": compiled}
        candidates["dense_compiled"] = generation(models["dense"], prompt, **static)
    candidates["sparselottery"].run()
    written, _ = candidates["sparselottery"].read()
    with torch.no_grad():
        logits = to_dense(sparse).double()(written[None, :-1].long()).logits[0, PROMPT - 1 :]
    measure(candidates, [written, logits], TOLERANCE, **case)
    for name, each in (("sparselottery", ms), ("limit", CONVERT_MS)):
        row = {"impl": name, "ms": f"{each:.4g}", "speedup": f"{each / ms:.3g}", "rounds": 1, "rejected": 0}
        rows.append(case | {"op": "convert"} | row)


def generation(model: nn.Module, prompt: Tensor, **more: object) -> Candidate:
    """The prompt with the tokens that are likeliest after it, and their logits."""
    tokens = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "use_cache": True, **more}
    told = {"output_logits": True, "return_dict_in_generate": True}
    last: list[Tensor] = []

    def run() -> None:
        found = model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **tokens, **told)
        last[:] = [found.sequences[0].double(), torch.cat(found.logits)]

    return Candidate(run, lambda: last)


@INDUCTOR
def test_vit(measure):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(num_labels=1000)
    images = torch.randn(8, 3, config.image_size, config.image_size)
    model = transformers.ViTForImageClassification(config)
    race(Of(model, "logits"), images, measure, "vit-b-16")


@INDUCTOR
def test_whisper(measure):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.WhisperConfig(d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536)
    model = transformers.models.whisper.modeling_whisper.WhisperEncoder(config)
    sound = torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions)
    race(Of(model, "last_hidden_state"), sound, measure, "whisper-tiny-encoder")


def race(model: nn.Module, given: Tensor, measure, net: str) -> None:
    """Measure a forward pass in evaluation mode."""
    sparse = convert(model.eval(), prune(model, 1 - DENSITY, method="random"), given)
    candidates = {"sparselottery": forward(sparse, given), "dense": forward(to_dense(sparse), given)}
    if peers.COMPILER_MISSING is None:
        candidates["dense_compiled"] = forward(frozen(to_dense(sparse), given), given)
    with torch.no_grad():
        truth = to_dense(sparse).double()(given.double())
    measure(candidates, [truth], TOLERANCE, net=net, op="forward", batch=len(given), density=DENSITY)


class Of(nn.Module):
    """One output of a model, as a tensor."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, given: Tensor) -> Tensor:
        return getattr(self.model(given), self.output)


def forward(model: nn.Module, given: Tensor) -> Candidate:
    run = torch.no_grad()(partial(model, given))
    return Candidate(run, lambda: [run()])
