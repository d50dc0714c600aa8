"""Export of spoilt checkpoints: the file has the checkpoint's tensors, or an error names one of them."""

import json
import tempfile
from pathlib import Path

import open_clip
import pytest
import torch
from fuzz import MEMORY, examples
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from otter_openclip.checkpoints.contents import TEACHER
from otter_openclip.model_folders.export import export_checkpoint

TINY = {"context_length": 8, "vocab_size": 49408, "width": 2, "heads": 1, "layers": 1}
CONFIG = {
    "embed_dim": 2,
    "vision_cfg": {"image_size": 8, "layers": 1, "width": 8, "head_width": 8, "patch_size": 4},
    "text_cfg": TINY,
}
FLOATS = (torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2)
OTHERS = (torch.int64, torch.int8, torch.uint8, torch.bool)  # torch casts them as it loads
KEYS = (
    "logit_scale",
    "text_projection",
    "positional_embedding",
    "visual.conv1.weight",
    "visual.ln_pre.bias",
    "transformer.resblocks.0.attn.in_proj_weight",
    "token_embedding.weight",
)
# What is done to one tensor: those in SAME can be loaded.
SAME = {
    "nothing": lambda x: x,
    "parameter": lambda x: torch.nn.Parameter(x),
    "not contiguous": lambda x: x.t().contiguous().t() if x.ndim == 2 else x,
    "constant": lambda x: x.flatten()[:1].expand(x.numel()).view(x.shape) if x.numel() else x,
    "float32": lambda x: x,
}
SAME |= {str(dtype): lambda x, dtype=dtype: x.to(dtype) for dtype in FLOATS}
SAME |= {str(dtype): lambda x, dtype=dtype: (9 * x).to(dtype) for dtype in OTHERS}
SPOILT = {
    "longer": lambda x: torch.cat([x, x]) if x.ndim else x[None],
    "flat": lambda x: x.flatten() if x.ndim > 1 else x.new_zeros(3),
    "deeper": lambda x: x[None, None],
    "empty": lambda x: x.new_zeros(0),
    "turned": lambda x: x.t() if x.ndim == 2 and x.shape[0] != x.shape[1] else x[None],
    "nan": lambda x: torch.full_like(x, torch.nan),
    "inf": lambda x: torch.full_like(x, torch.inf),
    "-inf": lambda x: torch.full_like(x, -torch.inf),
    "too large": lambda x: torch.full_like(x, 1e300, dtype=torch.float64),
    "sparse": lambda x: x.to_sparse(),
    "missing": lambda x: None,
    "list": lambda x: x.tolist() if x.numel() < 99 else 3,
}


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    (folder / "tiniest.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder)
    return open_clip.create_model("tiniest").state_dict()


@examples(5)
@given(
    done=st.dictionaries(st.sampled_from(KEYS), st.sampled_from([*SAME, *SPOILT]), max_size=3),
    extra=st.none() | st.sampled_from(["extra.weight", "visual.conv1.bias", "module.x", ""]),
    form=st.sampled_from(["bare", "run", "teacher", "parallel", "safetensors"]),
)
def test_equal_or_named(state, done, extra, form):
    changed = dict(state)
    for key, what in done.items():
        changed[key] = (SAME | SPOILT)[what](state[key].clone())
        if changed[key] is None:
            del changed[key]
    bad = {key for key, what in done.items() if what in SPOILT}
    if extra is not None:
        changed[extra] = torch.ones(2)
        bad.add(extra)
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        path, out = Path(name, "x.pt"), Path(name, "out")
        if form == "safetensors":
            path = path.with_suffix(".safetensors")
            try:
                save_file({k: v.detach().contiguous().clone() for k, v in changed.items()}, path)
            except (AttributeError, ValueError, KeyError, RuntimeError):
                return  # such a file cannot be
        else:
            saved = (
                {f"module.{k}": v for k, v in changed.items()} if form == "parallel" else changed
            )
            if form == "run":
                saved = {"epoch": 1, "state_dict": saved}
            if form == "teacher":
                entry = {"settings": {"loss": "otter"}, "teacher_state": {"num_updates": 1}}
                saved = {"epoch": 1, "state_dict": dict(state), TEACHER: saved, "otter": entry}
            torch.save(saved, path)
        weights = "teacher" if form == "teacher" else "student"
        try:
            export_checkpoint(path, out, model="tiniest", weights=weights, report=lambda _: None)
        except ValueError as error:
            assert bad, error
            assert any(key in str(error) for key in bad) and str(path) in str(error), (bad, error)
            assert not out.exists()
            return
        assert not bad, bad
        written = load_file(out / "open_clip_model.safetensors")
        assert written.keys() == state.keys()
        for key, value in changed.items():
            assert written[key].dtype == value.dtype and torch.equal(written[key], value), key
