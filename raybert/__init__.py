"""raybert: turn a fine-tuned BERT into a smaller, faster one, on one laptop or a Ray cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["UserError", "__version__", "compress", "finetune", "load", "load_recipe", "tune"]

if TYPE_CHECKING:
    from raybert.errors import UserError
    from raybert.models import load
    from raybert.recipe_file import load_recipe
    from raybert.run import compress, finetune
    from raybert.search import tune

# Imported on first use: torch, transformers and ray take seconds, and `raybert --help` needs none.
_HOMES = {
    "UserError": "raybert.errors",
    "load_recipe": "raybert.recipe_file",
    "load": "raybert.models",
    "compress": "raybert.run",
    "finetune": "raybert.run",
    "tune": "raybert.search",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'raybert' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
