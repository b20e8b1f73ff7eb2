"""Partially Relevant Video Retrieval: everything that a script needs for a run, from one import.

Names are looked up when they are first used, so that the commands answer to `--help` without importing PyTorch first.
"""
__version__ = "0.1.0"

from importlib import import_module

_MODULE_OF = {
    "UserError": "files",
    "Config": "config", "published_config": "config",
    "PRVRModel": "method.model", "write_toy": "data.toy", "PreparedSplit": "data.prepared", "prepare": "data.prepared",
    "load_checkpoint": "training.checkpoints", "save_checkpoint": "training.checkpoints",
    "load_released": "training.checkpoints", "from_released": "training.checkpoints",
    "to_released": "training.checkpoints",
    "embed": "evaluation.embeddings", "evaluate": "evaluation.rows", "zero_shot": "evaluation.rows",
    "train": "training.loop",
    "VideoIndex": "videos.index", "build_index": "videos.index", "open_searcher": "videos.search",
    "SearchPanel": "videos.panel",
}
__all__ = list(_MODULE_OF)


def __getattr__(name):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__():
    return sorted([*globals(), *__all__])
