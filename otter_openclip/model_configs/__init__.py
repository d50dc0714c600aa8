"""The package's model configurations, known to open_clip as soon as both packages are imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parent


def register() -> None:
    """Add the configurations to open_clip: now if it is imported, else when it is. Imports nothing."""
    if "open_clip" in sys.modules:
        sys.modules["open_clip"].add_model_config(FOLDER)
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


class _WhenImported(MetaPathFinder):
    """Leaves open_clip to the other finders, and has its loader add the configurations in the end."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders have for open_clip; None for everything else."""
        if name != "open_clip":
            return None
        others = [f for f in sys.meta_path if f is not self and hasattr(f, "find_spec")]
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self._extend(spec.loader)
        return spec

    def _extend(self, loader: object) -> None:
        execute = loader.exec_module  # type: ignore[attr-defined]

        def execute_and_add(module: ModuleType) -> None:
            execute(module)
            loader.exec_module = execute  # type: ignore[attr-defined]
            if self in sys.meta_path:  # once is enough
                sys.meta_path.remove(self)
                module.add_model_config(FOLDER)

        loader.exec_module = execute_and_add  # type: ignore[attr-defined]
