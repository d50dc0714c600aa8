"""The two towers under fitted heads, as a model that stock open_clip builds and loads.

An image head of timm's towers has a bias, which takes the mean off. That of Hugging Face's has none:
there the mean is taken off the bias of the last layer norm, after which tokens are averaged.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn

from otter_openclip.closed_form.heads import Heads
from otter_openclip.closed_form.two_towers import Towers
from otter_openclip.frozen import prefix
from otter_openclip.model_folders.assembly import build_model
from otter_openclip.model_folders.folder import PROBE_TEXTS

_CLOSE = 1e-4  # between a head of the written model and the fitted one, of unit length


def with_heads(
    towers: Towers, heads: Heads, logit_scale: float
) -> tuple[nn.Module, dict[str, Any]]:
    """The towers under ``heads`` fitted to what they give, and open_clip's configuration of the whole.

    ``logit_scale`` is the scale itself. ValueError if stock open_clip's towers cannot express the heads.
    """
    model, config = towers.model, copy.deepcopy(towers.config)
    config |= {"embed_dim": heads.text_weight.shape[1], "init_logit_scale": math.log(logit_scale)}
    vision, text = config["vision_cfg"], config["text_cfg"]
    if vision.get("timm_proj") == "none":  # without a head open_clip names the pooling itself
        vision["timm_pool"] = ""
    vision |= {"timm_proj": "linear", "timm_proj_bias": True, "timm_model_pretrained": False}
    text |= {"hf_proj_type": "linear", "hf_model_pretrained": False}
    fitted = build_model(config, dict(model.visual.preprocess_cfg))
    fitted.visual.trunk.load_state_dict(model.visual.trunk.state_dict())
    fitted.text.transformer.load_state_dict(model.text.transformer.state_dict())
    with torch.no_grad():
        fitted.visual.head.proj.weight.copy_(heads.image_weight.T)
        fitted.visual.head.proj.bias.copy_(-heads.image_mean @ heads.image_weight)
        fitted.text.proj.weight.copy_(heads.text_weight.T)
        fitted.logit_scale.fill_(math.log(logit_scale))
        tokens, before = _probes(towers)
        if heads.text_mean.any():
            _take_off(fitted.text, heads.text_mean, tokens, before)
        embedded = nn.functional.normalize(fitted.encode_text(tokens), dim=1)
    if not torch.allclose(embedded, heads.texts(before), rtol=0, atol=_CLOSE):
        raise ValueError("the text tower gives something else with the fitted head than without")
    return fitted, config


def _probes(towers: Towers) -> tuple[Tensor, Tensor]:
    """Tokens of some texts, and their features in full precision."""
    tokens = towers.tokenizer(PROBE_TEXTS)
    return tokens, prefix.run(towers.model, "text", tokens.to(towers.device)).cpu().float()


@torch.no_grad()
def takes_off_a_mean(towers: Towers) -> bool:
    """Whether the text tower has a layer norm whose bias its features follow."""
    tower, (tokens, before) = copy.deepcopy(towers.model.text).cpu(), _probes(towers)
    try:
        _take_off(tower, torch.linspace(-1, 1, before.shape[1]), tokens, before)
    except ValueError:
        return False
    return True


def _take_off(tower: HFTextEncoder, mean: Tensor, tokens: Tensor, before: Tensor) -> None:
    """Let the pooled output of ``tower`` be lower by ``mean`` (width,).

    Raises: ValueError if no layer norm's bias does that.
    """
    norms = [
        module
        for module in tower.transformer.modules()
        if "Norm" in type(module).__name__
        and getattr(module, "bias", None) is not None
        and module.bias.shape == mean.shape
    ]
    mask = (tokens != tower.config.pad_token_id).long()
    for norm in reversed(norms):
        bias = norm.bias.clone()
        norm.bias.sub_(mean)
        output = tower.transformer(input_ids=tokens, attention_mask=mask)
        after = tower.pooler(output, mask)
        if torch.allclose(after, before - mean, rtol=1e-4, atol=1e-4):
            return
        norm.bias.copy_(bias)
    raise ValueError(
        "the text tower cannot take the mean off its features: no last layer norm with a bias is "
        "followed by the pooling alone"
    )
