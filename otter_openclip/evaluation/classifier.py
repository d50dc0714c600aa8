"""Features of classes: prompts, encoded in batches, averaged over templates."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

BATCH_SIZE = 256  # prompts
PROBES = 2  # prompts; each costs as much as encoding several names

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
    progress: bool = True,
) -> Tensor:
    """(C, D) unit-norm features: the mean of each class's normalised prompts, normalised.

    Classes whose prompts the model cannot tell apart, the tokens being equal, are encoded once and have
    equal features. In float32 the padding behind the longest prompt of a batch is cut off, after a
    check on a few prompts that the model's features do not depend on it.

    ``prompts`` are C sequences; about ``batch_size`` prompts are encoded at a time, by an open_clip
    model in eval mode on ``device``, inside the context that ``autocast`` makes.
    """
    encode = None
    vectors: list[Tensor] = []
    row_of: dict[bytes, int] = {}  # by digest of the tokens
    rows = torch.zeros(len(prompts), dtype=torch.int64)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i][0]))
    step = max(1, batch_size // max(map(len, prompts)))
    with autocast(), tqdm(total=len(prompts), desc="Classes", disable=not progress) as bar:
        for begin in range(0, len(prompts), step):
            group, new = by_length[begin : begin + step], []
            tokens = tokenizer([text for i in group for text in prompts[i]])
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
        cut, whole = F.normalize(short.cut(probe), dim=-1), F.normalize(short(probe), dim=-1)
        same = torch.allclose(cut, whole, rtol=0, atol=1e-5)
    except (RuntimeError, IndexError, ValueError):  # the tower insists on its context length
        same = False
    return short.cut if same else model.encode_text


class _WithoutPadding(nn.Module):
    """A model's text tower, with what depends on the context length cut to the prompts' length."""

    def __init__(self, model: nn.Module, padding: int) -> None:
        super().__init__()
        self.model, self.padding = model, padding
        self.sized = {
            name: value
            for name, value in [*self.named_parameters(), *self.named_buffers()]
            if ".visual." not in name and name.endswith((".positional_embedding", ".attn_mask"))
        }

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens)

    def cut(self, tokens: Tensor) -> Tensor:
        context = tokens.shape[1]
        used = (tokens != self.padding).any(dim=0).nonzero()
        length = int(used.max()) + 1 if len(used) else context
        sized = {
            name: value[:length, :length] if value.shape == (context, context) else value[:length]
            for name, value in self.sized.items()
        }
        return torch.func.functional_call(self, sized, (tokens[:, :length],))
