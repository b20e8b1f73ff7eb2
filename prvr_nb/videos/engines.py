"""Where the token vectors of an index live, and who finds the nearest ones.

An engine only proposes: it names the tokens that a query comes nearest to. The scores are computed from its vectors,
in one place for all engines (`prvr_nb.videos.search`), so that no answer depends on the engine.
"""
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple, Protocol

import faiss
import numpy as np
import xxhash
from numpy import ndarray

from prvr_nb.data.cache import RowWriter
from prvr_nb.files import UserError, replacing

BRANCHES = ("frames", "clips")
FOLDER = "prvr-tokens-" # how the names of folders of vectors begin; each change of an index writes a new folder
CODE, METRIC = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
LINKS = 32 # of each token in a graph


class Tokens(NamedTuple):
    "The embeddings of one video, float16 of length 1."
    frames:ndarray # (n, d)
    clips:ndarray # (m, d); m is 0 for the teacher, who has no clip branch


class Engine(Protocol):
    """What an index asks of an engine. Videos go by their position: the order in which they were added.

    `state` is what opens it again, for the manifest: its name, the counts of tokens per video, and its own things.
    `candidates` gives falling scores of a branch's tokens and the positions of their videos; fewer than n_tokens only
    where the branch has no more. `close` is called once the manifest holds a new state: what it replaces may go.
    """
    state:dict
    n_bytes:int # of all vectors
    width:int # d
    def add(self, videos:Iterable): ... # of Tokens, behind those that are there
    def remove(self, gone:set): ... # positions
    def candidates(self, branch:str, query:ndarray, n_tokens:int)->tuple: ...
    def vectors(self, videos:Iterable)->Iterator: ... # positions → Tokens
    def close(self): ...


def checksum(path:Path)->str: # 16 hexadecimal digits
    "xxh3 of a file, as fast as it can be read."
    return xxhash.xxh3_64_hexdigest(np.memmap(path, mode="r"))


def flat_index(vectors:ndarray)->faiss.Index: # of (N, d) float16, mapped
    "FAISS over an array of which nothing is copied: float16 is its fp16 code. It reads all of it for every query."
    index = faiss.IndexScalarQuantizer(vectors.shape[1], CODE, METRIC)
    view = faiss.MaybeOwnedVectorUInt8.create_view
    index.codes = view(faiss.swig_ptr(vectors.view(np.uint8)), vectors.nbytes, index.codes.owner)
    index.ntotal = len(vectors)
    index.referenced_objects = [vectors] # as long as the index lives
    return index


@contextmanager
def one_thread()->Iterator:
    "One query is searched by one thread anyway; FAISS would start the others only to wait for them."
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


class FaissEngine:
    "Vectors in a folder, one file per branch, mapped; the nearest tokens are found for certain."
    name, files, width, n_bytes = "faiss", ("frames.npy", "clips.npy"), 1, 0

    def __init__(self, folder:Path, state:dict|None=None): # of the index, from its manifest; None: no videos yet
        self.folder = folder
        self.rows = {branch: np.zeros((0, 1), np.float16) for branch in BRANCHES}
        self.start = {branch: np.zeros(1, np.int64) for branch in BRANCHES} # first row of each video, then the end
        if state:
            self.open(state)

    def open(self, state:dict):
        "Map the files of a state; raises UserError when one of them is not what was written."
        place = self.folder/Path(state["folder"]).name
        for path in (place/name for name in self.files):
            if not path.is_file() or not path.stat().st_size or checksum(path) != state["checksums"].get(path.name):
                raise UserError(f"{path} is missing or damaged; delete {self.folder} and build the index again")
        self.state, self.place = state, place
        self.rows = {branch: np.load(place/f"{branch}.npy", mmap_mode="r") for branch in BRANCHES}
        self.start = {branch: np.cumsum([0, *state["counts"][branch]]) for branch in BRANCHES}
        if any(rows.dtype != "<f2" or len(rows) != self.start[branch][-1] for branch, rows in self.rows.items()):
            raise UserError(f"{place} does not belong to its index; delete {self.folder} and build the index again")
        self.index = {branch: self.searchable(branch) for branch in BRANCHES}
        self.width, self.n_bytes = self.rows["frames"].shape[1], sum(rows.nbytes for rows in self.rows.values())

    def searchable(self, branch:str)->faiss.Index:
        return flat_index(self.rows[branch])

    def __len__(self)->int: # videos
        return len(self.start["frames"]) - 1

    def vectors(self, videos:Iterable)->Iterator:
        for i in videos:
            yield Tokens(*(self.rows[branch][start[i]:start[i + 1]] for branch, start in self.start.items()))

    def candidates(self, branch:str, query:ndarray, n_tokens:int)->tuple:
        n_tokens = min(n_tokens, len(self.rows[branch]))
        if not n_tokens:
            return np.zeros(0, np.float32), np.zeros(0, np.int64)
        index = self.index[branch]
        if isinstance(index, faiss.IndexHNSW):
            index.hnsw.efSearch = n_tokens # as many candidates as are asked for
        with one_thread():
            scores, rows = index.search(query[None], n_tokens)
            if (rows < 0).any(): # a graph with islands does not reach as many
                scores, rows = flat_index(self.rows[branch]).search(query[None], n_tokens)
        return scores[0], self.start[branch].searchsorted(rows[0], side="right") - 1

    def add(self, videos:Iterable):
        self.rewrite(chain(self.vectors(range(len(self))), videos))

    def remove(self, gone:set):
        self.rewrite(self.vectors(i for i in range(len(self)) if i not in gone))

    def rewrite(self, videos:Iterable): # Tokens
        "Write the vectors of some videos into a new folder and go on with these."
        target = self.folder/(FOLDER + secrets.token_hex(4))
        with replacing(target) as aside:
            aside.mkdir()
            counts = self.write(aside, videos)
            checksums = {name: checksum(aside/name) for name in self.files}
        self.open({"name": self.name, "folder": target.name, "counts": counts, "checksums": checksums})

    def write(self, aside:Path, videos:Iterable)->dict: # number of tokens of each video, for both branches
        "Write the files of a folder."
        videos, counts = iter(videos), {branch: [] for branch in BRANCHES}
        first = list(islice(videos, 1))
        like = first[0].frames if first else self.rows["frames"]
        writers = {branch: RowWriter(aside/f"{branch}.npy", like) for branch in BRANCHES}
        for tokens in chain(first, videos):
            for branch, rows in zip(BRANCHES, tokens, strict=True):
                if rows.shape[1] != like.shape[1]:
                    raise UserError(f"{self.folder} has vectors of width {like.shape[1]}, these have {rows.shape[1]}: "
                                    "they lie in different spaces; build an index of their own")
                writers[branch].add(rows)
                counts[branch].append(len(rows))
        for writer in writers.values():
            writer.close()
        return counts

    def close(self):
        for path in self.folder.glob(FOLDER + "*"):
            if path.name != self.state["folder"]:
                shutil.rmtree(path, ignore_errors=True)


class HnswEngine(FaissEngine):
    "The same vectors, found through a graph: quick among very many, but it may miss some."
    name, files = "faiss-hnsw", (*FaissEngine.files, "frames.hnsw", "clips.hnsw")

    def searchable(self, branch:str)->faiss.Index:
        return on_codes(faiss.read_index(str(self.place/f"{branch}.hnsw")), flat_index(self.rows[branch]))

    def write(self, aside:Path, videos:Iterable)->dict:
        counts = super().write(aside, videos)
        for branch, old in self.rows.items(): # the graph grows, unless videos have been removed: then it is made anew
            rows = np.load(aside/f"{branch}.npy", mmap_mode="r")
            graph = faiss.IndexHNSWSQ(rows.shape[1], CODE, LINKS, METRIC)
            if len(old) and np.array_equal(old, rows[:len(old)]):
                codes = faiss.IndexScalarQuantizer(rows.shape[1], CODE, METRIC)
                codes.add_sa_codes(old.view(np.uint8))
                graph = on_codes(faiss.read_index(str(self.place/f"{branch}.hnsw")), codes)
            for i in range(graph.ntotal, len(rows), 2**14):
                graph.add(rows[i:i + 2**14].astype(np.float32))
            faiss.write_index(graph, str(aside/f"{branch}.hnsw"), faiss.IO_FLAG_SKIP_STORAGE)
        return counts


def on_codes(graph:faiss.Index, codes:faiss.Index)->faiss.Index:
    "A graph as its file holds it, put on the vectors that it connects."
    graph.storage, graph.referenced_objects = codes, [codes]
    return graph


ENGINES = {engine.name: engine for engine in (FaissEngine, HnswEngine)}


def open_engine(folder:Path, state:dict)->Engine: # of an index, from its manifest
    "The engine that a manifest names, with its videos."
    if state["name"] not in ENGINES:
        raise UserError(f"the engine of {folder} is {state['name']!r}; this version has {', '.join(ENGINES)}")
    return ENGINES[state["name"]](folder, state)
