"""What `prvr_search` does with an index and says about it: lines for people, values for JSON."""
import json
import math
from argparse import Namespace

from prvr_nb.config import published_config
from prvr_nb.files import UserError, write_json
from prvr_nb.training.checkpoints import open_checkpoint
from prvr_nb.videos.embedder import Embedder
from prvr_nb.videos.index import VideoIndex, build_index
from prvr_nb.videos.search import Hit, evaluate_moments, moment_text, open_embedder, open_searcher

LEVELS = "▁▂▃▄▅▆▇█"

def strip_text(
    hit:Hit,
    low:float, # relevance that is drawn lowest
    high:float, # relevance that is drawn highest
    width:int=32, # characters, without the brackets
)->str: # relevance over the video, the moment in brackets
    "A relevance curve in one line of text."
    curve, n = hit.curve.tolist(), min(width, len(hit.curve))
    pooled = [max(curve[i * len(curve) // n:-(-(i + 1) * len(curve) // n)]) for i in range(n)]
    steps = [int((x - low) / max(high - low, 1e-9) * len(LEVELS)) for x in pooled]
    drawn = [LEVELS[min(max(step, 0), len(LEVELS) - 1)] for step in steps]
    first = min(int(hit.start * n), n - 1)
    last = max(math.ceil(hit.end * n - 1e-6), first + 1)
    return "".join([*drawn[:first], "[", *drawn[first:last], "]", *drawn[last:]])

def results_text(
    hits:list, # of Hit, of one query
)->list: # one line each
    "Search results as a table; the strips of one query share their scale."
    low = min((hit.curve.min().item() for hit in hits), default=0)
    high = max((hit.curve.max().item() for hit in hits), default=0)
    moments = [moment_text(hit) for hit in hits]
    width = max(map(len, moments), default=0)
    return [f"{rank:3d}  {hit.score:.3f}  {moment:>{width}}  {strip_text(hit, low, high)}  {hit.title}"
            for rank, (hit, moment) in enumerate(zip(hits, moments, strict=True), 1)]

def result_row(
    hit:Hit,
)->dict: # for json
    "A result for machines; times in seconds when they are known."
    return {"id": hit.id, "title": hit.title, "score": hit.score,
            "share": {"start": hit.start, "end": hit.end, "peak": hit.peak},
            "seconds": dict(zip(("start", "end", "peak"), hit.seconds, strict=True)) if hit.seconds else None,
            "duration": hit.duration, "relevance": [round(x, 4) for x in hit.curve.tolist()]}

def moments_text(
    numbers:dict, # of moment_metrics
)->str: # a few lines
    "Moment metrics as a table, in percent."
    rows = [("", "in moment", "IoU"),
            ("best frame, its moment", numbers["hit"], numbers["iou"]),
            ("chance", numbers["hit_chance"], numbers["iou_chance"]),
            ("middle frame, middle half", numbers["hit_middle"], numbers["iou_middle"]),
            ("whole video", "–", numbers["iou_whole"])]
    cells = [[f"{x:.1f}" if isinstance(x, float) else x for x in row] for row in rows]
    return "\n".join([f"{numbers['queries']:,} queries with annotated moments, in percent",
                      *(f"{name:26}{hit:>10}{iou:>8}" for name, hit, iou in cells)])

def latency_text(
    rows:list, # of search_latency
)->str: # one line each
    "What a search takes, by number of videos."
    return "\n".join(f"{row['videos']:7,} videos, {row['bytes'] / 1e6:9,.0f} MB: "
                     f"{1000 * row['median']:9,.1f} ms" for row in rows)

def source_of(
    index:VideoIndex,
    args:Namespace, # root and dataset, or None
)->tuple: # root and dataset
    "The dataset that is asked for, or the one that an index was built from."
    root, dataset = index.sources[0]
    return args.root or root, args.dataset or dataset

def build(args:Namespace, device:str)->str:
    "Make an index."
    if args.zero_shot and not args.dataset:
        raise UserError("--zero-shot needs --dataset; a checkpoint would say what it was trained on")
    model, path = (None, None) if args.zero_shot else open_checkpoint(args.checkpoint, args.dataset)
    embedder = Embedder(model, published_config(args.dataset) if args.zero_shot else None, device)
    index = build_index(args.index, embedder, args.root, args.dataset, args.split, args.engine, path, args.text_model)
    return (f"{args.index}: {len(index):,} videos ({index.n_bytes / 1e6:,.1f} MB); "
            f"next: prvr_search --index {args.index} \"a sentence\"")

def add(args:Namespace, device:str)->str:
    "Add videos that an index lacks."
    index = VideoIndex(args.index)
    added = index.append(open_embedder(index, args.checkpoint, device), *source_of(index, args), args.split)
    return f"{args.index}: {added:,} new videos, {len(index):,} in all"

def remove(args:Namespace, device:str)->str:
    "Forget videos."
    index = VideoIndex(args.index)
    index.remove(args.ids)
    return f"{args.index}: {len(index):,} videos are left"

def ask(args:Namespace, device:str)->str:
    "Search."
    searcher = open_searcher(args.index, args.checkpoint, args.text_model, device)
    hits = searcher.search(args.queries, args.k, args.clip_score_weight, args.fraction)
    found = list(zip(args.queries, hits, strict=True))
    if args.json:
        return json.dumps([{"query": query, "results": [result_row(hit) for hit in hits]} for query, hits in found])
    return "\n\n".join("\n".join([query, *results_text(hits)]) for query, hits in found)

def moments(args:Namespace, device:str)->str:
    "Compare moments with annotated ones."
    index = VideoIndex(args.index)
    root, dataset = source_of(index, args)
    embedder = open_embedder(index, args.checkpoint, device)
    numbers = evaluate_moments(index, embedder, root, dataset, args.split, fraction=args.fraction)
    if args.out:
        about = {"dataset": dataset, "split": args.split, "kind": index.about["kind"], "config": index.about["config"]}
        write_json(args.out, {**about, "fraction": args.fraction, **numbers})
    return moments_text(numbers)
