"""An index: a folder whose `manifest.json` knows the videos, and whose engine holds their token vectors."""
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import NamedTuple

import xxhash
from tqdm.auto import tqdm

from prvr_nb.data.corpus import Problems, corpus_paths, open_features, read_features, read_moments, read_split
from prvr_nb.data.prepared import in_chunks
from prvr_nb.files import UserError, hold_folder, read_json, replace_file
from prvr_nb.videos.embedder import Embedder, check_text, describe_text
from prvr_nb.videos.engines import ENGINES, Engine, Tokens, open_engine

FORMAT, MANIFEST = "prvr_nb index 2", "manifest.json"
BUSY = ("being written by another process; wait for it", "folder") # see hold_folder


class Entry(NamedTuple):
    "One video of an index."
    id:str
    title:str # its file, or its id
    file:list|None # bytes of its file, and nanoseconds of the last change
    duration:float|int|None # seconds; None when nothing says so
    n_frames:int # T, rows of its features
    source:int # number of the dataset that it comes from
    sizes:list # (L_c,) frame tokens per clip; none without a clip branch


# The manifest


SHAPE = {"fingerprint": str, "kind": str, "clip_score_weight": float|int, "checkpoint": str|NoneType, "config": dict,
         "text": dict|NoneType, "sources": [{"root": str, "dataset": str}],
         "engine": {"name": str, "folder": str, "checksums": dict, "counts": {"frames": [int], "clips": [int]}},
         "videos": [{**Entry.__annotations__, "sizes": [int]}]}


def has_shape(value, shape)->bool: # a type, {name: shape} or [shape of each element]
    "Whether a value out of JSON is built as it should be; further names in it do no harm."
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(name in value and has_shape(value[name], s) for name, s in shape.items())
    if isinstance(shape, list):
        return isinstance(value, list) and all(has_shape(x, shape[0]) for x in value)
    return isinstance(value, shape) and not isinstance(value, bool)


def digest(about:dict)->str: # 16 hexadecimal digits
    "A checksum of all of a manifest but its checksum."
    rest = {name: value for name, value in about.items() if name != "checksum"}
    return xxhash.xxh3_64_hexdigest(json.dumps(rest, sort_keys=True).encode())


def read_manifest(folder:Path)->dict: # see SHAPE
    "What an index says about itself; raises UserError when there is none, an older or a damaged one."
    path, anew = folder/MANIFEST, f"delete {folder} and build the index again with prvr_search build"
    if not path.is_file():
        found = "an index of an older version" if (folder/"index.json").is_file() else "no finished index"
        raise UserError(f"{folder} holds {found}; build one with prvr_search build --index {folder}")
    about = read_json(path, anew)
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise UserError(f"{path} is not the manifest of an index of this version; choose another folder, or {anew}")
    if about.get("checksum") != digest(about) or not has_shape(about, SHAPE):
        raise UserError(f"{path} is damaged or was changed by hand; {anew}")
    return about


def write_index(folder:Path, about:dict, entries:list, engine:Engine):
    "Replace the manifest at once: from now on the index is this. Then the engine may forget what it was before."
    about = {**about, "videos": [entry._asdict() for entry in entries], "engine": engine.state}
    replace_file(folder/MANIFEST, json.dumps({**about, "checksum": digest(about)}, allow_nan=False).encode())
    engine.close()


# Videos of a dataset


def stored_ids(root:str|Path, dataset:str, split:str)->list:
    "Ids of the videos of a split; with 'all' those of all videos that have features, captions or not."
    problems, paths, ids = Problems(), corpus_paths(root, dataset), []
    if split != "all":
        ids = read_split(root, dataset, split, problems).videos
    elif file := open_features(paths.video, problems):
        with file:
            ids = list(file)
    problems.raise_if_any(f"{Path(root)/dataset}")
    if not ids:
        raise UserError(f"{paths.video} holds no video; make its features with prvr_features")
    return ids


def known_videos(root:str|Path, dataset:str)->dict: # id → (title, file, seconds), see Entry
    "What is known of videos besides their features: from prvr_features, else from moment annotations."
    from prvr_nb.videos.features import manifest_path, read_manifest, state_of
    if manifest_path(root, dataset).exists():
        made = read_manifest(root, dataset)
        files = {id: video.get("file") for id, video in made["videos"].items()}
        return {id: (name or id, name and state_of(Path(made["folder"])/name), made["videos"][id]["duration"])
                for id, name in files.items()}
    annotated = [read_moments(root, dataset, split) for split in ("train", "val", "test")]
    return {video: (video, None, moments[0].duration)
            for found in annotated for (video, _), moments in found.items() if moments}


def add_dataset(folder:Path, about:dict, entries:list, engine:Engine, # of an index that is held
                embedder:Embedder, root:str|Path, dataset:str, ids:list, quiet:bool)->int: # number of new videos
    "Put videos of a dataset behind those that are there; when anything goes wrong, the index stays what it was."
    there = {entry.id for entry in entries}
    ids = [id for id in ids if id not in there]
    source = {"root": os.path.relpath(root, folder), "dataset": dataset}
    sources = about["sources"] + [source] * (source not in about["sources"])
    problems, path, known = Problems(), corpus_paths(root, dataset).video, known_videos(root, dataset)
    bar = tqdm(read_features(path, ids, "frame", problems), "index", len(ids), unit=" videos", disable=quiet or None)
    new = []

    def embedded():
        for some in in_chunks(bar, embedder.at_once):
            if problems.found:
                continue # only look for more of them
            tokens = embedder.embed_videos([array for _, array in some])
            for (i, array), (frames, clips, sizes) in zip(some, tokens, strict=True):
                facts = known.get(ids[i], (ids[i], None, None))
                new.append(Entry(ids[i], *facts, len(array), sources.index(source), sizes))
                yield Tokens(frames.half().numpy(), clips.half().numpy())
        problems.raise_if_any(f"{Path(root)/dataset}")

    if ids:
        engine.add(embedded())
        write_index(folder, {**about, "sources": sources}, entries + new, engine)
    return len(new)


# The index


class VideoIndex:
    "Videos that can be searched, in a folder that build_index made."
    def __init__(self, folder:str|Path):
        self.folder = Path(folder)
        self.reopen()

    def reopen(self):
        "Look at the folder as it is now, and check it; when a writer has replaced it meanwhile, look again."
        about = read_manifest(self.folder)
        try:
            self.engine = open_engine(self.folder, about["engine"])
        except (UserError, OSError, RuntimeError): # of FAISS
            if read_manifest(self.folder) == about:
                raise
            return self.reopen()
        self.about, self.n_bytes = about, self.engine.n_bytes
        self.entries = [Entry(*(row[name] for name in Entry._fields)) for row in about["videos"]]
        self.positions = {entry.id: i for i, entry in enumerate(self.entries)}

    def __len__(self)->int:
        return len(self.entries)

    @property
    def checkpoint(self)->Path|None:
        "Where the model was when the index was built; paths are relative to the folder, so that both may move."
        return self.about["checkpoint"] and Path(os.path.normpath(self.folder/self.about["checkpoint"]))

    @property
    def sources(self)->list: # of (root, dataset)
        "The datasets that its videos come from, as Entry.source numbers them."
        return [(Path(os.path.normpath(self.folder/s["root"])), s["dataset"]) for s in self.about["sources"]]

    def check(self, embedder:Embedder):
        "Raise UserError for another checkpoint than the one the index was built with."
        if embedder.fingerprint != self.about["fingerprint"]:
            raise UserError(f"{self.folder} was built with another checkpoint (fingerprint "
                            f"{self.about['fingerprint']}, this one has {embedder.fingerprint}); use "
                            f"{self.checkpoint or 'that one'}, or build an index for this one")

    def position(self, name:str)->int: # an id, a title, or a title without its folders
        "Where a video stands; raises UserError when it is not there, or when several are called so."
        if name in self.positions:
            return self.positions[name]
        titles = {i: entry.title for i, entry in enumerate(self.entries)}
        found = [i for i in titles if titles[i] == name] or [i for i in titles if Path(titles[i]).name == name]
        if len(found) != 1:
            which = f"{len(found)} videos {name}; name one of {', '.join(titles[i] for i in found[:5])}"
            raise UserError(f"{self.folder} holds {which if found else f'no video {name}'}")
        return found[0]

    def append(self, embedder:Embedder, root:str|Path, dataset:str, split:str="all", quiet:bool=False)->int:
        "Add the videos of a dataset that it does not hold yet; says how many there were."
        with hold_folder(self.folder, *BUSY):
            self.reopen()
            self.check(embedder)
            ids, state = stored_ids(root, dataset, split), (self.folder, self.about, self.entries, self.engine)
            check_text(describe_text(root, dataset), self.about["text"], Path(root)/dataset)
            n_new = add_dataset(*state, embedder, root, dataset, ids, quiet)
        self.reopen()
        return n_new

    def remove(self, names:Iterable): # see position
        "Forget videos."
        with hold_folder(self.folder, *BUSY):
            self.reopen()
            gone = {self.position(name) for name in names}
            self.engine.remove(gone)
            left = [entry for i, entry in enumerate(self.entries) if i not in gone]
            write_index(self.folder, self.about, left, self.engine)
        self.reopen()


def build_index(
    folder:str|Path, # to make
    embedder:Embedder, # what turns videos into embeddings
    root:str|Path, # folder that holds the datasets
    dataset:str|None=None, # one of them; default: the one of the configuration
    split:str="all", # see stored_ids
    engine:str="faiss", # or 'faiss-hnsw': quicker from some 50,000 videos on, but it may miss some
    checkpoint:str|Path|None=None, # file of the model, noted for later searches
    text_model:str|None=None, # for datasets that do not say which
    quiet:bool=False, # no progress bar
)->VideoIndex:
    "Embed the videos of a dataset and store them; a killed run leaves no index."
    folder, dataset = Path(folder), dataset or embedder.config.dataset
    if engine not in ENGINES:
        raise UserError(f"the engine is {engine!r}; choose one of {', '.join(ENGINES)}")
    with hold_folder(folder, *BUSY):
        if (folder/MANIFEST).exists():
            raise UserError(f"{folder} holds an index already; add to it with prvr_search add, "
                            "or choose another folder")
        ids, text = stored_ids(root, dataset, split), describe_text(root, dataset, text_model)
        if not embedder.model and text and text.get("raw_tokens"):
            raise UserError(f"{Path(root)/dataset} has raw token states, which zero-shot search cannot compare with "
                            "frames; make its features without --raw-tokens")
        about = {"format": FORMAT, "kind": "model" if embedder.model else "zero-shot",
                 "fingerprint": embedder.fingerprint, "clip_score_weight": embedder.clip_score_weight,
                 "checkpoint": checkpoint and os.path.relpath(checkpoint, folder), "config": asdict(embedder.config),
                 "text": text, "sources": []}
        add_dataset(folder, about, [], ENGINES[engine](folder), embedder, root, dataset, ids, quiet)
    return VideoIndex(folder)
