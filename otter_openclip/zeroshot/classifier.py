"""Features of classes: prompts, encoded in batches, averaged over templates, kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

TEMPLATES = ("simple", "imagenet")
BATCH_SIZE = 256  # prompts
PROBES = 2  # each costs as much as encoding several names
NAME = "class_features"

Autocast = Callable[[], AbstractContextManager]


def read_templates(source: str) -> list[str]:
    """Templates with ``{c}`` for the class name.

    Args:
        source: "simple" (``a photo of {c}.``), "imagenet" (open_clip's 80), or a UTF-8 file with one
            template a line and ``{}`` or ``{c}`` where the name goes.

    Raises:
        ValueError: naming the line, if a line has no place for the name.
        FileNotFoundError: if there is no such file.
    """
    if source == "simple":
        return ["a photo of {c}."]
    if source == "imagenet":
        return [template("{c}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"--templates {source}: no such file; give {', '.join(TEMPLATES)} or a file with one "
            "template a line"
        )
    templates = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        template = line.strip().replace("{}", "{c}")
        if not template:
            continue
        try:
            if template.format(c="a") == template.format(c="b"):
                raise ValueError("no {} in it")
        except (ValueError, KeyError, IndexError) as error:
            raise ValueError(
                f"--templates {source}, line {number}: {line!r} is no template ({error!r}); write {{}} "
                "once where the class name goes"
            ) from None
        templates.append(template)
    if not templates:
        raise ValueError(f"--templates {source} is empty; give one template a line")
    return templates


def check_classnames(names: Sequence[str], where: str) -> None:
    """Raise ValueError for an empty name, with its place in ``where``; warn about repeated names."""
    for i, name in enumerate(names):
        if not name.strip():
            raise ValueError(
                f"{where}, line {i + 1}: empty class name; every line is a class, so name it or remove "
                "the line and its column of the label vectors"
            )
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        logging.warning(
            f"{where}: {len(repeated)} names stand for several classes, e.g. {repeated[0]!r}; such "
            "classes always score the same, and F@K takes the first of them first"
        )


def make_prompts(
    names: Sequence[str], templates: Sequence[str] | Mapping[str, Sequence[str]]
) -> list[tuple[str, ...]]:
    """Each class's prompts: ``templates`` filled in, or those it maps the name to.

    Raises:
        ValueError: if a name has no prompts, or a template another place than ``{c}``.
    """
    if isinstance(templates, Mapping):
        missing = [name for name in names if not templates.get(name)]
        if missing:
            raise ValueError(f"no prompts for {len(missing)} classes, e.g. {missing[0]!r}")
        return [tuple(templates[name]) for name in names]
    for template in templates:
        try:
            template.format(c="")
        except (ValueError, KeyError, IndexError):
            raise ValueError(
                f"{template!r} is no template: the class name's place is {{c}}"
            ) from None
    return [tuple(template.format(c=name) for template in templates) for name in names]


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

    Equal prompts are encoded once. In float32 the padding behind the longest prompt of a batch is cut
    off, after a check on a few prompts that the model's features do not depend on it.

    Args:
        model: an open_clip model in eval mode.
        tokenizer: its tokenizer.
        prompts: C sequences of prompts.
        device: where the model is.
        autocast: makes the context the model runs in.
        batch_size: prompts encoded at a time.
        progress: show a progress bar.
    """
    unique = sorted(set(prompts), key=lambda texts: len(texts[0]))  # batches of similar length
    encode = None
    parts = []
    with autocast(), tqdm(total=len(unique), desc="Classes", disable=not progress) as bar:
        for group in _groups(unique, batch_size):
            tokens = tokenizer([text for texts in group for text in texts]).to(device)
            if encode is None:
                encode = _encoder(model, tokenizer, tokens, torch.device(device))
            encoded = [F.normalize(encode(part), dim=-1) for part in tokens.split(batch_size)]
            features = torch.cat(encoded).split([len(texts) for texts in group])
            parts.append(torch.stack([_mean(part) for part in features]))
            bar.update(len(group))
    place = {texts: i for i, texts in enumerate(unique)}
    return torch.cat(parts)[torch.tensor([place[texts] for texts in prompts], device=device)]


def _mean(features: Tensor) -> Tensor:
    mean = features.mean(dim=0)
    mean /= mean.norm()  # vector by vector as in clip_benchmark: in bfloat16 the rounding differs
    return mean


def _groups(prompts: Sequence[Sequence[str]], size: int) -> Any:
    group, count = [], 0
    for texts in prompts:
        group.append(texts)
        count += len(texts)
        if count >= size:
            yield group
            group, count = [], 0
    if group:
        yield group


def _encoder(
    model: nn.Module, tokenizer: Any, tokens: Tensor, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """``model.encode_text``, without the padding where that changes nothing.

    Names are a few tokens long, contexts dozens. Only in float32: in half precision the shorter
    product rounds otherwise, and the features would no longer be the ones clip_benchmark computes.
    """
    half = torch.is_autocast_enabled(device.type) or any(
        p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()
    )
    if half:
        return _rounded_as_single(model)
    if not isinstance(tokens, Tensor) or tokens.ndim != 2:
        return model.encode_text
    short = _WithoutPadding(model, tokenizer)
    probe = tokens[:PROBES]
    try:
        same = torch.allclose(
            F.normalize(short(probe), dim=-1),
            F.normalize(model.encode_text(probe), dim=-1),
            rtol=0,
            atol=1e-5,
        )
    except (RuntimeError, IndexError, ValueError):  # the tower insists on its context length
        same = False
    return short if same else model.encode_text


def _rounded_as_single(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """``model.encode_text``, in half precision rounding a batch as clip_benchmark's single class.

    ``nn.MultiheadAttention`` transposes a batch, and ``linear`` of what is not contiguous rounds the
    product once more before it adds the bias; a batch of one is contiguous whichever way it is turned.
    """
    linear = F.linear

    def contiguous(given: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return linear(given.contiguous(), *args, **kwargs)

    def encode(tokens: Tensor) -> Tensor:
        with mock.patch.object(F, "linear", contiguous):
            return model.encode_text(tokens)

    return encode


class _WithoutPadding:
    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self.text = _EncodeText(model)
        self.padding = tokenizer([""])[0, -1].item()
        tensors = [*self.text.named_parameters(), *self.text.named_buffers()]
        self.sized = {
            name: value
            for name, value in tensors
            if ".visual." not in name
            and name.rsplit(".", 1)[-1] in ("positional_embedding", "attn_mask")
        }

    def __call__(self, tokens: Tensor) -> Tensor:
        context = tokens.shape[1]
        used = (tokens != self.padding).any(dim=0).nonzero()
        length = int(used.max()) + 1 if len(used) else context
        cut = {
            name: value[:length, :length] if value.shape == (context, context) else value[:length]
            for name, value in self.sized.items()
        }
        return torch.func.functional_call(self.text, cut, (tokens[:, :length],))


class _EncodeText(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens)


def warn_about_cut_prompts(tokenizer: Any, prompts: Sequence[Sequence[str]]) -> Tensor | None:
    """Warn if the tokenizer cuts prompts off; returns the tokens of each class's longest prompt."""
    longest = [max(texts, key=len) for texts in prompts]
    tokens = tokenizer(longest)
    if not isinstance(tokens, Tensor):
        return None
    padding = tokenizer([""])[0, -1]
    full = (tokens[:, -1] != padding).nonzero()[:, 0].tolist()
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


def cached_class_features(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    prompts: Sequence[Sequence[str]],
    *,
    device: str | torch.device,
    autocast: Autocast = nullcontext,
    folder: Path | None,
    progress: bool = False,
) -> Tensor:
    """``class_features``, read from ``folder`` if they are there, else computed and written there.

    The file's name is a digest of everything they depend on: weights and structure of the model,
    tokens, prompts in their order, precision. A file that is damaged is computed anew.
    """
    tokens = warn_about_cut_prompts(tokenizer, prompts)
    path = None
    if folder is not None:
        with autocast():
            key = _key(model, tokens, prompts, torch.device(device))
        path = folder / f"{key}.safetensors"
        if path.is_file():
            features = _read(path, key, len(prompts))
            if features is not None:
                return features.to(device)
    features = class_features(
        model, tokenizer, prompts, device=device, autocast=autocast, progress=progress
    )
    if path is not None:
        _write(path, key, features)
    return features


def _key(model: nn.Module, tokens: Tensor | None, prompts: Any, device: torch.device) -> str:
    half = torch.is_autocast_enabled(device.type)
    precision = str(torch.get_autocast_dtype(device.type)) if half else "full"
    digest = hashlib.sha256(f"2 {device.type} {precision}\n{model}\n".encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(_bytes(value))
    if tokens is not None:
        digest.update(_bytes(tokens))
    digest.update(json.dumps(prompts).encode())
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _read(path: Path, key: str, classes: int) -> Tensor | None:
    try:
        with safe_open(path, "pt") as file:
            metadata, features = file.metadata() or {}, file.get_tensor(NAME)
    except (SafetensorError, OSError) as error:
        reason = str(error)
    else:
        digest = hashlib.sha256(_bytes(features)).hexdigest()
        if metadata.get("key") == key and metadata.get("sha256") == digest:
            return features
        reason = "its contents do not match its digest"
    logging.warning(f"Class features in {path} are damaged ({reason}); computing them again")
    return None


def _write(path: Path, key: str, features: Tensor) -> None:
    features = features.detach().cpu().contiguous()
    metadata = {"key": key, "sha256": hashlib.sha256(_bytes(features)).hexdigest()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In a folder of its own: there the file can have the usual mode, so that others can read it.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as temporary:
            written = Path(temporary) / path.name
            written.write_bytes(save({NAME: features}, metadata=metadata))
            os.replace(written, path)
    except OSError as error:  # a cache that cannot be written is no reason to lose the result
        logging.warning(f"Class features could not be kept in {path.parent}: {error}")
