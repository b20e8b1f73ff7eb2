"""What a search finds, ready to be shown: frames, events, titles and ranks of each result."""
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prvr_nb.data.corpus import Problems, corpus_paths, read_captions, read_features, read_moments
from prvr_nb.evaluation.embeddings import exact_matmul
from prvr_nb.method.tokens import resample
from prvr_nb.videos.cards import Answer, Card, events_html, frame_jpeg, image_html, jpeg, peak_text
from prvr_nb.videos.features import manifest_path, read_manifest
from prvr_nb.videos.images import picture_at
from prvr_nb.videos.index import VideoIndex
from prvr_nb.videos.search import Hit, Searcher, score_blocks, search


def find_events(
    frames:np.ndarray, # (T, D) features
    most:int=8, # events, at most: as many as there are colours
    share:float=0.05, # of all variation that may be lost with one merge
    n_tokens:int=128, # a longer video is resampled to so many
)->np.ndarray: # (min(T, n_tokens),) number of the event that each token belongs to
    "Cut a video where its frames change: neighbours merge, the cheapest first (Ward), while little variation is lost."
    x = torch.as_tensor(frames, dtype=torch.float)
    if len(x) > n_tokens: x = resample(x, torch.tensor([len(x)]), n_tokens)[0]
    x = (x - x.mean(0)).double()
    means, sizes, price = list(x), [1] * len(x), share * x.square().sum().item()
    while len(means) > 1:
        left, right, n = torch.stack(means[:-1]), torch.stack(means[1:]), torch.tensor(sizes, dtype=torch.double)
        costs = n[:-1] * n[1:] / (n[:-1] + n[1:]) * (left - right).square().sum(1)
        i = costs.argmin().item()
        if costs[i] > price and len(means) <= most: break
        means[i:i + 2] = [(sizes[i] * means[i] + sizes[i + 1] * means[i + 1]) / (sizes[i] + sizes[i + 1])]
        sizes[i:i + 2] = [sizes[i] + sizes[i + 1]]
    return np.repeat(np.arange(len(sizes)), sizes)


def plain(
    sentence:str,
)->str: # lower case, single spaces, without a full stop
    "What two spellings of one query have in common."
    return " ".join(sentence.lower().split()).rstrip(".")


class Collection:
    "What is known about the videos of a collection besides their embeddings: files, captions, moments, features."
    def __init__(self,
        root:str|Path, # folder that holds the collections
        dataset:str, # one of them
    ):
        self.root, self.dataset, self.cut = Path(root), dataset, {}

    @cached_property
    def manifest(self)->dict|None:
        "Where the video files are; None when prvr_features did not make the collection."
        return read_manifest(self.root, self.dataset) if manifest_path(self.root, self.dataset).exists() else None

    @cached_property
    def moments(self)->dict: # video → list of (sentence, Moment)
        "Annotated moments."
        found = {}
        for split in "train", "val", "test":
            for (video, sentence), moments in read_moments(self.root, self.dataset, split).items(): found.setdefault(video, []).extend((sentence, moment) for moment in moments)
        return found

    @cached_property
    def captions(self)->dict: # plain sentence → {video: sentence}
        "Queries and their videos."
        found = {}
        paths = (corpus_paths(self.root, self.dataset, split).captions for split in ("val", "test", "train"))
        for caption in (c for path in paths if path.exists() for c in read_captions(path, Problems())): found.setdefault(plain(caption.sentence), {})[caption.video] = caption.sentence
        return found

    def file(self, video:str)->Path|None:
        "Its video file, when it is where it was."
        name = self.manifest and self.manifest["videos"].get(video, {}).get("file")
        path = name and Path(self.manifest["folder"])/name
        return path if path and path.is_file() else None

    def events(self, video:str)->np.ndarray|None: # of find_events
        "Its events, found once in its features; None when these are gone."
        if video not in self.cut:
            found = [rows for _, rows in read_features(corpus_paths(self.root, self.dataset).video, [video], "frame", Problems())]
            self.cut[video] = find_events(found[0]) if found else None
        return self.cut[video]


def best_frame(
    collection:Collection,
    hit:Hit, # of a video of it
)->bytes|None: # JPEG; None when there is no file to look into
    "The picture at the best frame token of a result."
    if not collection.manifest or hit.id not in collection.manifest["videos"] or not hit.seconds: return None
    try:
        if path := collection.file(hit.id): return frame_jpeg(path, path.stat().st_mtime, round(hit.seconds[2], 2))
        if "shots" in collection.manifest["videos"][hit.id]: return jpeg(picture_at(collection.manifest, hit.id, hit.seconds[2]))
    except Exception: return None # a damaged file must not hide the other results
    return None


def said_there(
    hit:Hit,
    annotated:list, # of (sentence, Moment), of its video
)->str|None: # a caption
    "What the corpus says about the best frame of a result."
    inside = [sentence for sentence, m in annotated if m.start <= hit.peak * m.duration < m.end]
    return inside[0] if inside else None


@exact_matmul()
def rank_of(
    index:VideoIndex,
    query:Tensor, # (1, d) of length 1
    clip_score_weight:float, # of the clip score, the frame score has the rest
    video:str, # its id
)->int: # 1 for the best
    "Where a video stands among all; of equal scores the video that was indexed first is better, as in top_k."
    scores, places = (torch.cat(x, -1) for x in zip(*((s.cpu(), p.cpu()) for s, p in score_blocks(index, query, clip_score_weight, 2**21))))
    here = (places == index.position(video)).nonzero().item()
    own = scores[0, here]
    return 1 + int((scores[0] > own).sum() + (scores[0, :here] == own).sum())


class Library:
    "The collections behind an index, opened when they are needed."
    def __init__(self, index:VideoIndex): self.index, self.opened = index, {}

    def collection(self, video:str)->Collection:
        "Where a video comes from."
        entry = self.index.entries[self.index.position(video)]
        if entry.source not in self.opened: self.opened[entry.source] = Collection(*self.index.source(entry))
        return self.opened[entry.source]

    @property
    def collections(self)->list:
        "All of them."
        firsts = {entry.source: entry.id for entry in reversed(self.index.entries)}
        return [self.collection(firsts[source]) for source in sorted(firsts)]

    def own(self, sentence:str)->dict: # video → sentence as the corpus spells it
        "The indexed videos that a sentence is a caption of."
        return {video: spelt for c in self.collections for video, spelt in c.captions.get(plain(sentence), {}).items() if video in self.index.positions}

    def card(self, hit:Hit, place:int, own:dict)->Card:
        "A result with all that is known about it."
        collection = self.collection(hit.id)
        annotated, spelt = collection.moments.get(hit.id, []), own.get(hit.id)
        picture = best_frame(collection, hit)
        drawn = image_html(picture, f"{hit.title} {peak_text(hit)}") if picture else events_html(collection.events(hit.id), hit.peak)
        return Card(hit, place, drawn, spelt is not None, [m for sentence, m in annotated if sentence == spelt], said_there(hit, annotated))


def answer(
    searcher:Searcher,
    library:Library, # of its index
    query:Tensor, # (1, d) embedding
    own:dict, # videos that the query is a caption of
    k:int, # results
    clip_score_weight:float, # of the clip score
)->Answer:
    "Everything that the panel shows of one method."
    hits, = search(searcher.index, query, k, clip_score_weight)
    ranks = {video: rank_of(searcher.index, query, clip_score_weight, video) for video in own}
    return Answer([library.card(hit, place, own) for place, hit in enumerate(hits, 1)], clip_score_weight, ranks)
