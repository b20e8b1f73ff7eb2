"""What a search finds, ready to be shown: frames, events, captions and ranks of each result."""
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prvr_nb.data.corpus import Problems, corpus_paths, read_captions, read_features, read_moments
from prvr_nb.method.tokens import resample
from prvr_nb.videos.cards import Answer, Card, events_html, frame_jpeg, image_html, jpeg, peak_text
from prvr_nb.videos.features import manifest_path, read_manifest
from prvr_nb.videos.images import picture_at
from prvr_nb.videos.index import VideoIndex
from prvr_nb.videos.search import Hit, Searcher, score_all, search


def find_events(
    frames:np.ndarray, # (T, D) features
    most:int=8, # events, at most: as many as there are colours
    share:float=0.05, # of all variation that may be lost with one merge
    n_tokens:int=128, # a longer video is resampled to so many
)->np.ndarray: # (min(T, n_tokens),) number of the event that each token belongs to
    "Cut a video where its frames change: neighbours merge, the cheapest first (Ward), while little variation is lost."
    x = torch.as_tensor(frames, dtype=torch.float)
    if len(x) > n_tokens:
        x = resample(x, torch.tensor([len(x)]), n_tokens)[0]
    x = (x - x.mean(0)).double()
    means, sizes, price = list(x), [1] * len(x), share * x.square().sum().item()
    while len(means) > 1:
        n = torch.tensor(sizes, dtype=torch.double)
        costs = n[:-1] * n[1:] / (n[:-1] + n[1:]) * torch.stack(means).diff(dim=0).square().sum(1)
        i = costs.argmin().item()
        if costs[i] > price and len(means) <= most:
            break
        both = sizes[i] + sizes[i + 1]
        means[i:i + 2] = [(sizes[i] * means[i] + sizes[i + 1] * means[i + 1]) / both]
        sizes[i:i + 2] = [both]
    return np.repeat(np.arange(len(sizes)), sizes)


def plain(sentence:str)->str: # lower case, single spaces, without a full stop
    "What two spellings of one query have in common."
    return " ".join(sentence.lower().split()).rstrip(".")


class DatasetDetails:
    "What is known about the videos of a dataset besides their embeddings: files, captions, moments, features."
    def __init__(self, root:str|Path, dataset:str): # folder that holds the datasets; one of them
        self.root, self.dataset, self.found_events = Path(root), dataset, {}

    @cached_property
    def manifest(self)->dict|None:
        "Where the video files are; None when prvr_features did not make the dataset."
        there = manifest_path(self.root, self.dataset).exists()
        return read_manifest(self.root, self.dataset) if there else None

    @cached_property
    def moments(self)->dict: # video → list of (sentence, Moment)
        "Annotated moments."
        found = {}
        for split in "train", "val", "test":
            for (video, sentence), moments in read_moments(self.root, self.dataset, split).items():
                found.setdefault(video, []).extend((sentence, moment) for moment in moments)
        return found

    @cached_property
    def captions(self)->dict: # plain sentence → {video: sentence}
        "Queries and their videos."
        found = {}
        for split in "val", "test", "train":
            path = corpus_paths(self.root, self.dataset, split).captions
            for caption in read_captions(path, Problems()) if path.exists() else ():
                found.setdefault(plain(caption.sentence), {})[caption.video] = caption.sentence
        return found

    def file(self, video:str)->Path|None:
        "Its video file, when it is where it was."
        name = self.manifest and self.manifest["videos"].get(video, {}).get("file")
        path = name and Path(self.manifest["folder"])/name
        return path if path and path.is_file() else None

    def events(self, video:str)->np.ndarray|None: # of find_events
        "Its events, found once in its features; None when these are gone."
        if video not in self.found_events:
            path = corpus_paths(self.root, self.dataset).video
            found = [find_events(rows) for _, rows in read_features(path, [video], "frame", Problems())]
            self.found_events[video] = found[0] if found else None
        return self.found_events[video]

    def best_frame(self, hit:Hit)->bytes|None: # JPEG
        "The picture at the best frame token of a result; None when there is no file to look into."
        known = self.manifest and self.manifest["videos"].get(hit.id)
        if not known or not hit.seconds:
            return None
        try:
            if path := self.file(hit.id):
                return frame_jpeg(path, path.stat().st_mtime, round(hit.seconds[2], 2))
            return jpeg(picture_at(self.manifest, hit.id, hit.seconds[2])) if "shots" in known else None
        except Exception: # a damaged file must not hide the other results
            return None

    def caption_at(self, hit:Hit)->str|None:
        "What the dataset says about the best frame of a result."
        there = [sentence for sentence, moment in self.moments.get(hit.id, [])
                 if moment.start <= hit.peak * moment.duration < moment.end]
        return there[0] if there else None


def rank_of(index:VideoIndex, query:Tensor, clip_score_weight:float, video:str)->int: # query: (1, d) of length 1
    "Where a video stands among all; of equal scores the video that was indexed first is better, as in a search."
    scores, here = score_all(index, query[0].cpu().numpy(), clip_score_weight), index.positions[video]
    return 1 + int((scores > scores[here]).sum() + (scores[:here] == scores[here]).sum())


class Method:
    "A searcher, with the datasets behind its index, opened when they are needed."
    def __init__(self, searcher:Searcher):
        self.searcher, self.index, self.asked, self.query = searcher, searcher.index, None, None
        self.datasets = [DatasetDetails(*source) for source in self.index.sources]

    @property
    def has_clips(self)->bool:
        "Whether there is a clip branch: the teacher has none."
        return self.searcher.embedder.model is not None

    def dataset(self, video:str)->DatasetDetails:
        "Where a video comes from."
        return self.datasets[self.index.entries[self.index.positions[video]].source]

    def captioned(self, sentence:str)->dict: # video → sentence as its dataset spells it
        "The indexed videos that a sentence is a caption of."
        found = [dataset.captions.get(plain(sentence), {}) for dataset in self.datasets]
        return {video: spelt for videos in found for video, spelt in videos.items() if video in self.index.positions}

    def card(self, hit:Hit, place:int, own:dict)->Card: # its rank; see captioned
        "A result with all that is known about it."
        dataset, spelt = self.dataset(hit.id), own.get(hit.id)
        frame = dataset.best_frame(hit)
        picture = (image_html(frame, f"{hit.title} {peak_text(hit)}") if frame
                   else events_html(dataset.events(hit.id), hit.peak))
        truth = [moment for sentence, moment in dataset.moments.get(hit.id, []) if sentence == spelt]
        return Card(hit, place, picture, spelt is not None, truth, dataset.caption_at(hit))

    def answer(self, sentence:str, k:int, clip_score_weight:float)->Answer:
        "The k best results and all that is shown of them; a sentence is encoded once while only the rest changes."
        if sentence != self.asked:
            self.asked, self.query = sentence, self.searcher.embed([sentence])
        weight, own = clip_score_weight if self.has_clips else 0., self.captioned(sentence)
        hits, = search(self.index, self.query, k, weight)
        ranks = {video: rank_of(self.index, self.query, weight, video) for video in own}
        return Answer([self.card(hit, place, own) for place, hit in enumerate(hits, 1)], weight, ranks)
