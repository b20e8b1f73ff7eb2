"""What turns videos and sentences into the embeddings that search compares: a trained model, or the teacher."""
import hashlib
import json
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prvr_nb.config import Config
from prvr_nb.data.corpus import corpus_paths, stored_query
from prvr_nb.data.prepared import STORED, in_chunks, pack_queries, pad_queries
from prvr_nb.data.toy import ToyWorld, sentence_features, toy_seed
from prvr_nb.evaluation.embeddings import VIDEOS_AT_ONCE, Teacher, encoder_precision
from prvr_nb.files import UserError
from prvr_nb.method.model import PRVRModel, prepare_videos
from prvr_nb.method.tokens import resample_bounds

ENCODES = ("merge_schedule", "merge_similarity", "uniform_clips", "hidden_size", "heads", "sft_factor",
           "precision") # settings that change an embedding


class Embedder:
    "A trained model, or with None the teacher, as functions from features to embeddings of length 1."
    def __init__(self, model:PRVRModel|None=None, config:Config|None=None, device:str|torch.device="cpu"):
        if model and model.config.pooling == "mean":
            raise UserError("the model was trained with pooling = mean: one vector per video has no moments; "
                            "search with a model that has pooling = max")
        self.device, self.model, self.config = torch.device(device), model, config or model.config
        self.encoder = (model or Teacher()).to(self.device).eval()
        self.at_once = VIDEOS_AT_ONCE.get(self.device.type, 8) # videos

    @cached_property
    def fingerprint(self)->str: # 16 hexadecimal digits
        "A checksum of all weights and of the settings that change an embedding: what an index knows it by."
        digest = hashlib.sha256(json.dumps([getattr(self.config, name) for name in ENCODES]).encode())
        for name, weight in sorted(self.encoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().numpy().data.cast("B"))
        return digest.hexdigest()[:16]

    @property
    def clip_score_weight(self)->float:
        "Weight of the clip score at retrieval; the teacher has no clip branch."
        return self.config.clip_score_weight if self.model else 0.

    def check_width(self, what:str, arrays:list):
        "Raise UserError when the model was trained on 'video' or 'query' features of another width."
        width = arrays[0].shape[1]
        if self.model and width != (wanted := getattr(self.model, f"d_{what}")):
            raise UserError(f"the checkpoint reads {what} features of width {wanted}, these have {width}; "
                            "use the features it was trained on")

    @torch.no_grad()
    def embed_videos(self, arrays:list)->list: # (T, D_v) features of some videos → (n, d) frames, (m, d) clips, sizes
        "Tokens of videos, on the CPU. The teacher's have no clips, and of a short video each frame once."
        self.check_width("video", arrays)
        videos, half = prepare_videos(arrays, self.config), STORED[self.config.precision]
        parts = (x.to(self.device) for x in (videos.frames.to(half), videos.clips.to(half), videos.sizes))
        with encoder_precision(self.config, self.device):
            encoded = self.encoder.encode_videos(*parts)
        frames, clips = (F.normalize(x.float(), dim=-1).cpu() for x in encoded)
        if not (frames.isfinite().all() and clips.isfinite().all()):
            raise UserError("the embeddings of some videos are not finite; train again with a lower --lr")
        if self.model:
            return list(zip(frames, clips, videos.sizes.int().tolist(), strict=True))
        bounds = resample_bounds(torch.tensor([len(a) for a in arrays]), frames.shape[1])[:, :-1]
        once = bounds.diff(dim=1, prepend=bounds[:, :1] - 1) > 0 # (B, L_f) the first token of each frame
        return [(x[mine], x[:0], []) for x, mine in zip(frames, once, strict=True)]

    @torch.no_grad()
    def embed_queries(self, arrays:list, block:int=64)->Tensor: # (L_q, D_q) features, last row [EOS] → (Q, d)
        "Embeddings of queries, on the CPU."
        found = []
        for some in in_chunks(arrays, block):
            self.check_width("query", some)
            queries = pack_queries(some, np.zeros(len(some), np.int64))
            tokens, mask = (x.to(self.device) for x in pad_queries(queries, torch.arange(len(some)))[:2])
            with encoder_precision(self.config, self.device):
                found.append(F.normalize(self.encoder.query(tokens, mask).float(), dim=-1).cpu())
        return torch.cat(found)


class TextEncoder(NamedTuple):
    "How sentences become token features."
    encode:Callable # list of sentences → list of (L_q, D_q) float32 arrays, last row [EOS]
    about:dict # which encoder it is: its model, fingerprint and raw_tokens, or the seed of the toy world


def recognise(root:str|Path, dataset:str, model:str)->dict: # see TextEncoder.about
    "Find out how a text model made the query features of a dataset; raises UserError when it did not."
    from prvr_nb.videos.clip import encode_text, fingerprint, load_encoder
    (sentence, rows), encoder = stored_query(root, dataset), load_encoder(model)
    if sentence is None:
        raise UserError(f"{Path(root)/dataset} has no queries to compare {model} with; "
                        "make its features with prvr_features")
    for raw in False, True:
        made, kept = encode_text([sentence], encoder, raw)[0][-1], rows[-1]
        if made.shape == kept.shape and made @ kept > 0.99 * np.linalg.norm(made) * np.linalg.norm(kept):
            return {"model": str(model), "fingerprint": fingerprint(encoder), "raw_tokens": raw}
    raise UserError(f"{model} gives the sentence {sentence!r} other features than {corpus_paths(root, dataset).text} "
                    "holds; name the text model that made them")


def describe_text(root:str|Path, dataset:str, model:str|None=None)->dict|None: # see TextEncoder.about
    "Which text encoder made the query features of a dataset: what the dataset says, else a model that is named."
    from prvr_nb.videos.features import manifest_path, read_manifest
    if manifest_path(root, dataset).exists():
        manifest = read_manifest(root, dataset)
        return {name: manifest[name] for name in ("model", "fingerprint", "raw_tokens")}
    if dataset == "toy":
        return {"toy": toy_seed(root)}
    return recognise(root, dataset, model) if model else None


def open_text(about:dict|None, model:str|None=None, device:str|torch.device|None=None)->TextEncoder:
    "The text encoder that a description names, at the place where it is now; another one is refused."
    if about is None:
        raise UserError("nothing says which text encoder made the features; build the index with --text-model NAME")
    if "toy" in about:
        world = ToyWorld(about["toy"])
        return TextEncoder(lambda sentences: [sentence_features(world, sentence) for sentence in sentences], about)
    from prvr_nb.videos.clip import encode_text, fingerprint, load_encoder
    encoder = load_encoder(model or about["model"], device)
    if fingerprint(encoder) != about["fingerprint"]:
        raise UserError(f"{encoder.name} is not the text encoder that the features were made with ({about['model']}, "
                        f"fingerprint {about['fingerprint']}); name that one with --text-model")
    return TextEncoder(partial(encode_text, encoder=encoder, raw_tokens=about["raw_tokens"]), about)


def check_text(found:dict|None, wanted:dict|None, what:str|Path): # a dataset's, an index's, the former for the message
    "Raise UserError when two text encoders differ; where a model lies does not matter."
    if found and wanted and {**found, "model": None} != {**wanted, "model": None}:
        raise UserError(f"{what} belongs to text features of {found}, the index to those of {wanted}; "
                        "use that one, or build another index")
