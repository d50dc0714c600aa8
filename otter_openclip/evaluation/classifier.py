"""Features of classes: prompts, encoded in batches, averaged over templates, kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from otter_openclip.files import written_whole

BATCH_SIZE = 256  # prompts
PROBES = 2  # each costs as much as encoding several names
NAME = "class_features"
VERSION = 3  # of how they are computed

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
    similar = sorted(range(len(prompts)), key=lambda i: len(prompts[i][0]))  # in length
    step = max(1, batch_size // max(map(len, prompts)))
    with autocast(), tqdm(total=len(prompts), desc="Classes", disable=not progress) as bar:
        for begin in range(0, len(prompts), step):
            group, new = similar[begin : begin + step], []
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
            if ".visual." not in name and name.endswith((".positional_embedding", ".attn_mask"))
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


def cached_class_features(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    prompts: Sequence[Sequence[str]],
    *,
    device: str | torch.device,
    autocast: Autocast,
    folder: Path | None,
) -> Tensor:
    """``class_features``, read from ``folder`` if they are there, else computed and kept there.

    The file's name is a digest of everything they depend on: weights and structure of the model,
    tokens, prompts in their order, precision. A file that is damaged is computed anew.
    """
    tokens = _warn_about_cut_prompts(tokenizer, prompts)
    path = None
    if folder is not None:
        with autocast():
            key = _key(model, tokens, prompts, torch.device(device).type)
        path = folder / f"{key}.safetensors"
        if path.is_file() and (features := _read(path)) is not None:
            return features.to(device)
    features = class_features(model, tokenizer, prompts, device=device, autocast=autocast)
    if path is not None:
        _write(path, features.cpu().contiguous())
    return features


def _warn_about_cut_prompts(tokenizer: Any, prompts: Sequence[Sequence[str]]) -> Tensor:
    """Warn if the tokenizer cuts prompts off; returns the tokens of each class's longest prompt."""
    longest = [max(texts, key=len) for texts in prompts]
    tokens = tokenizer(longest)
    full = (tokens[:, -1] != tokenizer([""])[0, -1]).nonzero()[:, 0].tolist()
    # Cut if more text makes no difference.
    longer = tokenizer([f"{longest[i]} and more" for i in full]) if full else ()
    cut = [i for i, row in zip(full, longer, strict=True) if torch.equal(tokens[i], row)]
    if cut:
        lost = len(set(longest)) - len(torch.unique(tokens, dim=0))
        logging.warning(
            f"{len(cut)} of {len(prompts)} classes have prompts longer than the model's "
            f"{tokens.shape[1]} tokens, which are cut off, e.g. {longest[cut[0]]!r}"
            + (f"; {lost} can no longer be told from another class" if lost > 0 else "")
        )
    return tokens


def _key(model: nn.Module, tokens: Tensor, prompts: Any, kind: str) -> str:
    half = torch.is_autocast_enabled(kind)
    precision = str(torch.get_autocast_dtype(kind)) if half else "full"
    digest = hashlib.sha256(f"{VERSION} {kind} {precision}\n{model}\n".encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(_bytes(value))
    digest.update(_bytes(tokens))
    digest.update(json.dumps(prompts).encode())
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _seal(path: Path, features: Tensor) -> dict[str, str]:
    return {"sha256": hashlib.sha256(path.name.encode() + _bytes(features)).hexdigest()}


def _read(path: Path) -> Tensor | None:
    try:
        with safe_open(path, "pt") as file:
            metadata, features = file.metadata(), file.get_tensor(NAME)
        if metadata == _seal(path, features):
            return features
        reason: Any = "its contents do not match its digest"
    except (SafetensorError, OSError) as error:
        reason = error
    logging.warning(f"Class features in {path} are damaged ({reason}); computing them again")
    return None


def _write(path: Path, features: Tensor) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            file.write(save({NAME: features}, metadata=_seal(path, features)))
    except OSError as error:  # a cache that cannot be written is no reason to lose the result
        logging.warning(f"Class features could not be kept in {path.parent}: {error}")
