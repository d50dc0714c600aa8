"""Features of classes: prompts, encoded in batches, averaged over templates."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

BATCH_SIZE = 256  # prompts
PROBES = 2  # each costs as much as encoding several names

Autocast = Callable[[], AbstractContextManager]


@torch.no_grad()
def class_features(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    prompts: Sequence[Sequence[str]],
    *,
    device: str | torch.device,
    autocast: Autocast = nullcontext,
    batch_size: int = BATCH_SIZE,
    progress: bool = False,
) -> Tensor:
    """(C, D) unit-norm features: the mean of each class's normalised prompts, normalised.

    Classes whose prompts the model cannot tell apart, the tokens being equal, are encoded once and have
    equal features. In float32 the padding behind the longest prompt of a batch is cut off, after a
    check on a few prompts that the model's features do not depend on it.

    Args:
        model: an open_clip model in eval mode.
        tokenizer: its tokenizer.
        prompts: C sequences of prompts.
        device: where the model is.
        autocast: makes the context the model runs in.
        batch_size: prompts encoded at a time.
        progress: show a progress bar.
    """
    encode = None
    vectors: list[Tensor] = []
    row_of: dict[bytes, int] = {}  # by digest of the tokens
    rows = torch.zeros(len(prompts), dtype=torch.int64)
    with autocast(), tqdm(total=len(prompts), desc="Classes", disable=not progress) as bar:
        for group in _groups(prompts, batch_size):
            tokens = tokenizer([text for i in group for text in prompts[i]])
            new = []
            parts = tokens.split([len(prompts[i]) for i in group])
            for i, part in zip(group, parts, strict=True):
                digest = hashlib.sha256(part.numpy()).digest()
                if digest not in row_of:
                    row_of[digest] = len(row_of)
                    new.append(part)
                rows[i] = row_of[digest]
            if new:
                tokens = torch.cat(new).to(device)
                encode = encode or _encoder(model, tokenizer, tokens)
                encoded = [F.normalize(encode(part), dim=-1) for part in tokens.split(batch_size)]
                for part in torch.cat(encoded).split([len(part) for part in new]):
                    mean = part.mean(dim=0)
                    vectors.append(mean / mean.norm())
            bar.update(len(group))
        return torch.stack(vectors)[rows.to(device)]


def _groups(prompts: Sequence[Sequence[str]], size: int) -> Iterator[list[int]]:
    """Indices of classes with prompts of similar length, about ``size`` prompts together."""
    group, count = [], 0
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i][0])):
        group.append(i)
        count += len(prompts[i])
        if count >= size:
            yield group
            group, count = [], 0
    if group:
        yield group


def _encoder(model: nn.Module, tokenizer: Any, tokens: Tensor) -> Callable[[Tensor], Tensor]:
    """``model.encode_text``, without the padding where that changes nothing.

    Names are a few tokens long, contexts dozens. Only in float32: in half precision a check on a few
    prompts could not tell what matters from rounding.
    """
    half = torch.is_autocast_enabled(tokens.device.type) or any(
        p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()
    )
    if half or tokens.ndim != 2:
        return model.encode_text
    short = _WithoutPadding(model, tokenizer([""])[0, -1].item())
    probe = tokens[:PROBES]
    try:
        found, expected = F.normalize(short.cut(probe), dim=-1), F.normalize(short(probe), dim=-1)
        same = torch.allclose(found, expected, rtol=0, atol=1e-5)
    except (RuntimeError, IndexError, ValueError):  # the tower insists on its context length
        same = False
    return short.cut if same else model.encode_text


class _WithoutPadding(nn.Module):
    def __init__(self, model: nn.Module, padding: int) -> None:
        super().__init__()
        self.model, self.padding = model, padding
        self.sized = {
            name: value
            for name, value in [*self.named_parameters(), *self.named_buffers()]
            if ".visual." not in name
            and name.rsplit(".", 1)[-1] in ("positional_embedding", "attn_mask")
        }

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens)

    def cut(self, tokens: Tensor) -> Tensor:
        context = tokens.shape[1]
        used = (tokens != self.padding).any(dim=0).nonzero()
        length = int(used.max()) + 1 if len(used) else context
        cut = {
            name: value[:length, :length] if value.shape == (context, context) else value[:length]
            for name, value in self.sized.items()
        }
        return torch.func.functional_call(self, cut, (tokens[:, :length],))


def warn_about_cut_prompts(tokenizer: Any, prompts: Sequence[Sequence[str]]) -> Tensor:
    """Warn if the tokenizer cuts prompts off; returns the tokens of each class's longest prompt."""
    longest = [max(texts, key=len) for texts in prompts]
    tokens = tokenizer(longest)
    full = (tokens[:, -1] != tokenizer([""])[0, -1]).nonzero()[:, 0].tolist()
    if full:
        # Cut if more text makes no difference.
        longer = tokenizer([f"{longest[i]} and more" for i in full])
        cut = [i for i, row in zip(full, longer, strict=True) if torch.equal(tokens[i], row)]
        if cut:
            lost = len(set(longest)) - len(torch.unique(tokens, dim=0))
            logging.warning(
                f"{len(cut)} of {len(prompts)} classes have prompts longer than the model's "
                f"{tokens.shape[1]} tokens, which are cut off, e.g. {longest[cut[0]]!r}"
                + (f"; {lost} can no longer be told from another class" if lost else "")
            )
    return tokens
