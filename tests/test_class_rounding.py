"""Under clip_benchmark's default mixed precision batched class features are its single ones."""

import functools

import open_clip
import torch
from clip_benchmark.metrics.zeroshot_classification import zero_shot_classifier

from otter_openclip.zeroshot.classifier import class_features, make_prompts


def test_bfloat16_class_features_are_clip_benchmarks():
    torch.manual_seed(0)
    model = open_clip.create_model("otter-glyph").eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero at first, and adding zero does not round
            torch.nn.init.normal_(parameter, std=0.3)
    tokenizer = open_clip.get_tokenizer("otter-glyph")
    names = [f"class {'x' * (i % 5)} {i}" for i in range(200)]
    template = ["a photo of {c}."]
    stock = zero_shot_classifier(model, tokenizer, names, template, "cpu", amp=True).T
    ours = class_features(
        model,
        tokenizer,
        make_prompts(names, template),
        device="cpu",
        autocast=functools.partial(torch.autocast, "cpu"),
    )
    assert ours.dtype == stock.dtype == torch.bfloat16
    differ = (ours != stock).any(dim=1).float().mean()
    # The last projection, a matrix product for a batch and a vector's for one, may round otherwise.
    assert differ < 0.05
