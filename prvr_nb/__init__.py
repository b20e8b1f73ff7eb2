"""Partially Relevant Video Retrieval: train, evaluate and search from Python.

Everything a script needs for a run, from one import; this file is the only one of the package that is written by hand.
"""
__version__ = "0.1.0"

from prvr_nb.config import Config, UserError, published_config
from prvr_nb.evaluation import embed, evaluate, zero_shot
from prvr_nb.model import PRVRModel, from_released, load_checkpoint, load_released, save_checkpoint, to_released
from prvr_nb.prepared import Corpus, prepare
from prvr_nb.toy import write_toy
from prvr_nb.training import train

__all__ = ["Config", "Corpus", "PRVRModel", "UserError", "embed", "evaluate", "from_released", "load_checkpoint", "load_released", "prepare",
           "published_config", "save_checkpoint", "to_released", "train", "write_toy", "zero_shot"]
