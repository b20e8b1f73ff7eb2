"""Partially Relevant Video Retrieval: everything that a script needs for a run, from one import.

This file is the only one of the package that is written by hand. Names are looked up when they are first used, so that the commands answer
at once to `--help` instead of importing PyTorch first.
"""
__version__ = "0.1.0"

from importlib import import_module

_MODULE_OF = {
    "Config": "config", "UserError": "config", "published_config": "config",
    "Corpus": "prepared", "prepare": "prepared",
    "PRVRModel": "model", "load_checkpoint": "model", "save_checkpoint": "model", "load_released": "model", "from_released": "model", "to_released": "model",
    "embed": "evaluation", "evaluate": "evaluation", "zero_shot": "evaluation",
    "train": "training", "write_toy": "toy",
    "VideoIndex": "search", "build_index": "search", "open_searcher": "search", "SearchPanel": "panel",
}
__all__ = list(_MODULE_OF)


def __getattr__(name):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__():
    return sorted([*globals(), *__all__])
