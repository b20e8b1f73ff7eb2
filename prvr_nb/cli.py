"""The commands; nobody imports this module."""
import _thread
import argparse
import errno
import json
import math
import secrets
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F

from prvr_nb.app import check_app, check_port, index_names, serve, write_page
from prvr_nb.config import RENAMED, Config, published_config, read_config
from prvr_nb.data.corpus import check_corpus
from prvr_nb.data.download import PACKS, download
from prvr_nb.data.toy import write_toy
from prvr_nb.demo import demo_indexes
from prvr_nb.evidence.recordings import RECORDED, record_once
from prvr_nb.files import UserError, write_json
from prvr_nb.speed import search_latency
from prvr_nb.training.checkpoints import open_checkpoint
from prvr_nb.videos.clip import DEFAULT_MODEL
from prvr_nb.videos.embedder import Embedder
from prvr_nb.videos.features import extract_videos
from prvr_nb.videos.images import extract_images
from prvr_nb.videos.index import DTYPES, VideoIndex, build_index
from prvr_nb.videos.moments import FRACTION
from prvr_nb.videos.search import Hit, evaluate_moments, moment_text, open_embedder, open_searcher, open_searchers


def whole_numbers(
    text:str, # of a flag
)->tuple: # of int
    "Several whole numbers, separated by commas."
    try: return tuple(int(part) for part in text.split(","))
    except ValueError: raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers like 128,80,52,32") from None

def flag_type(
    kind:type, # of the field
)->Callable: # text → value
    "How a flag's text becomes a value; several numbers are separated by commas."
    return whole_numbers if kind is tuple else kind


def add_config_flags(
    parser:argparse.ArgumentParser, # gets a flag per field of Config
    without:tuple=(), # fields that the command decides itself
):
    "Every setting as a flag; what is not given keeps the dataset's published value."
    parser.usage = f"{parser.prog} [--help] [--FLAG VALUE ...]"
    parser.epilog = "A setting that is not given takes the dataset's published value (toy: ours). Lists are whole numbers separated by commas."
    for f in (f for f in fields(Config) if f.name not in without):
        flag, help = "--" + f.name.replace("_", "-"), f.metadata["help"]
        kind = type(f.default)
        old = next((old for old, new in RENAMED.items() if new == f.name), None)
        if old:  # the flag's former name stays, unseen
            parser.add_argument("--" + old.replace("_", "-"), dest=f.name, default=argparse.SUPPRESS, help=argparse.SUPPRESS,
                                **(dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=flag_type(kind))))
        if kind is bool: parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help)
        else: parser.add_argument(flag, type=flag_type(kind), default=argparse.SUPPRESS, choices=f.metadata["choices"], help=help,
                                  metavar=None if f.metadata["choices"] else f.name.upper())


def given_settings(
    args:argparse.Namespace, # parsed flags
)->dict: # field name → value
    "The settings that stand on the command line."
    return {f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}


def interrupt_again(unraisable):
    "Python drops a Ctrl-C that arrives in the callback of a weak reference, of which h5py has many; ask for it once more."
    if unraisable.exc_type is KeyboardInterrupt: threading.Timer(0.01, _thread.interrupt_main).start()
    else: sys.__unraisablehook__(unraisable)

def remedy(
    error:OSError, # of a file
    command:str, # its name
)->str: # what to do about it
    "Room for a file that did not fit; otherwise another look at the paths."
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG): return "check --root, --out and --checkpoint"
    return "make room and run the command again" + (" with --resume: the last saved state is intact" if command == "prvr_train" else "")

def run_command(
    main:Callable, # does the work with parsed arguments
    parser:argparse.ArgumentParser, # reads the command line
    argv:list|None=None, # arguments, or None for those of the process
)->int: # exit status
    "Run a command; a user's mistake becomes one message on stderr and exit status 1, an interruption 130."
    args = parser.parse_args(argv)
    hook, sys.unraisablehook = sys.unraisablehook, interrupt_again
    try: main(args)
    except UserError as error: print(f"{parser.prog}: {error}", file=sys.stderr); return 1
    except OSError as error: print(f"{parser.prog}: {error.filename or 'a file'} cannot be used ({error.strerror or error}); {remedy(error, parser.prog)}", file=sys.stderr); return 1
    except KeyboardInterrupt: print(f"{parser.prog}: stopped", file=sys.stderr); return 130
    finally: sys.unraisablehook = hook
    return 0


def run_config(
    args:argparse.Namespace, # parsed flags of prvr_train
)->Config: # of the run
    "The settings of the run that goes on, or of a new one; what stands on the command line counts in both."
    path = args.out/"config.json"
    if args.resume and path.exists(): return replace(read_config(path), **given_settings(args))
    return published_config(**given_settings(args))


def train_command(argv:list|None=None)->int:
    "prvr_train: train and evaluate on one corpus."
    parser = argparse.ArgumentParser("prvr_train", allow_abbrev=False, description="Train on a collection and evaluate the best epoch on its validation split.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--root", required=True, type=Path, help="folder that holds the collections")
    parser.add_argument("--out", required=True, type=Path, help="run folder to make")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out, with its settings; without one there, start it")
    parser.add_argument("--checkpoint-seconds", type=float, default=600., help="time between two saves within an epoch; every epoch ends with one")
    add_config_flags(parser)

    def main(args):
        from prvr_nb.training.distributed import find_processes
        from prvr_nb.evaluation.report import text_table
        from prvr_nb.training.loop import train
        config = run_config(args)
        if find_processes().is_main_process: print(json.dumps(asdict(config), indent=1))
        rows = train(config, args.root, args.out, resume=args.resume, checkpoint_seconds=args.checkpoint_seconds)
        if rows: print(text_table(rows)) # one of several processes has them
    return run_command(main, parser, argv)


def start_folder(
    out:Path, # folder for metrics.json
):
    "Make a folder for results before anything is computed; one that holds a run is refused."
    if (out/"history.jsonl").exists(): raise UserError(f"{out} holds a run, whose metrics.json stays as training wrote it; choose another --out")
    out.mkdir(parents=True, exist_ok=True)

def eval_command(argv:list|None=None)->int:
    "prvr_eval: evaluate a checkpoint."
    parser = argparse.ArgumentParser("prvr_eval", allow_abbrev=False, description="Evaluate a checkpoint on a split; prints the table and, with --out, writes metrics.json.")
    parser.add_argument("--checkpoint", required=True, type=Path, help="a run folder, its best.safetensors, or a .ckpt of the released code")
    parser.add_argument("--root", required=True, type=Path, help="folder that holds the collections")
    parser.add_argument("--dataset", help="collection name; default: the one it was trained on; a .ckpt takes its published settings")
    parser.add_argument("--split", default="val", help="train, val or test")
    parser.add_argument("--out", type=Path, help="folder for metrics.json")

    def main(args):
        from prvr_nb.training.distributed import find_processes
        from prvr_nb.evaluation.rows import evaluate, zero_shot
        from prvr_nb.training.checkpoints import open_checkpoint
        from prvr_nb.data.prepared import prepare
        from prvr_nb.evaluation.report import text_table
        if args.out: start_folder(args.out)
        model, path = open_checkpoint(args.checkpoint, args.dataset)
        corpus, = prepare(args.root, replace(model.config, dataset=args.dataset or model.config.dataset), (args.split,))
        device = find_processes().device
        rows = zero_shot(corpus, device) + [{"name": path.resolve().parent.name, **evaluate(model, corpus, device)}]
        print(text_table(rows))
        if args.out:
            write_json(args.out/"metrics.json", {"rows": rows, "split": args.split, "checkpoint": str(path)})
    return run_command(main, parser, argv)


def data_command(argv:list|None=None)->int:
    "prvr_data: fetch, check or make a corpus."
    parser = argparse.ArgumentParser("prvr_data", allow_abbrev=False, description="Corpora on disk.")
    actions = parser.add_subparsers(dest="action", required=True)
    fetch = actions.add_parser("download", help="fetch one of the authors' feature packs (needs gdown)")
    fetch.add_argument("name", help=", ".join(PACKS))
    fetch.add_argument("--url", help="another place to fetch the archive from")
    look = actions.add_parser("check", help="read every feature and report everything that is missing")
    look.add_argument("name", help="collection name")
    look.add_argument("--limit", type=int, default=20, help="findings shown at most")
    toy = actions.add_parser("toy", help="write the toy corpus")
    toy.add_argument("--seed", type=int, default=0, help="of its world and stories")
    for action in fetch, look, toy: action.add_argument("--root", type=Path, default=Path("data"), help="folder that holds the collections (default: data)")

    def main(args):
        if args.action == "download": print(f"{download(args.name, args.root, args.url)} is ready; next: prvr_data check {args.name} --root {args.root}")
        if args.action == "check": print("\n".join(check_corpus(args.root, args.name, limit=args.limit)))
        if args.action == "toy": print(f"{write_toy(args.root, seed=args.seed)} is ready; next: prvr_train --dataset toy --root {args.root} --out runs/toy")
    return run_command(main, parser, argv)


ROW_SWITCHES = ("tcpl", "cbva", "adaptive", "uniform_clips") # what the rows of an experiment differ in

def demo_command(argv:list|None=None)->int:
    "prvr_demo: toy corpus, baseline and full method, one table, one page."
    parser = argparse.ArgumentParser("prvr_demo", allow_abbrev=False, description="Write the toy corpus, train baseline and full method on it, compare them.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder that holds the collections")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the runs, metrics.json and report.html; an older demo in it is replaced")
    add_config_flags(parser, without=("dataset", *ROW_SWITCHES))

    def main(args):
        from prvr_nb.demo import run_demo
        from prvr_nb.evaluation.report import text_table
        print(text_table(run_demo(args.root, args.out, **given_settings(args))))
        print(f"The table is in {args.out/'metrics.json'}; curves, similarity maps and ranked examples are in {args.out/'report.html'}.")
    return run_command(main, parser, argv)


def experiment_command(argv:list|None=None)->int:
    "prvr_experiment: the runs behind the results notebook."
    parser = argparse.ArgumentParser("prvr_experiment", allow_abbrev=False, description="Train every row of an experiment with several seeds, the epoch chosen on training videos that are held out; one small JSON file per run. Continues where it was stopped.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("experiment", choices=("choice", "ablation", "sensitivity"), help="width and learning rate of the baseline; rows of the paper's Table 1 with controls; the full method with one setting changed at a time")
    parser.add_argument("--root", required=True, type=Path, help="folder that holds the collections")
    parser.add_argument("--out", required=True, type=Path, help="folder for the JSON files")
    parser.add_argument("--seeds", type=int, default=1, help="runs per row")
    parser.add_argument("--held-out", type=float, default=0.15, help="share of the training videos that choose the epoch")
    add_config_flags(parser, without=("seed", "variant", "pooling", *ROW_SWITCHES))

    def main(args):
        from prvr_nb.evidence.experiments import run_experiment
        given = given_settings(args)
        run_experiment(args.experiment, given.pop("dataset", "toy"), args.root, args.out, args.seeds, args.held_out, **given)
    return run_command(main, parser, argv)


def bench_command(argv:list|None=None)->int:
    "prvr_bench: what preparing, training and evaluating cost on this machine."
    parser = argparse.ArgumentParser("prvr_bench", allow_abbrev=False, description="Measure preparing, training steps (baseline and full method in turn), TCPL and evaluation with random features of the published sizes; writes one JSON file.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="JSON file to write, e.g. runs/bench/mine.json")
    parser.add_argument("--batch", type=int, help="videos in a step, five queries each; default: 128 on a GPU, 32 on a CPU")
    parser.add_argument("--budget", type=float, default=5., help="seconds to spend on each figure, about")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True, help="measure compiled encoders too (compiling takes minutes)")

    def main(args):
        from accelerate import PartialState
        from prvr_nb.speed import Sizes, bench, bench_table
        device = PartialState().device
        batch = args.batch or (128 if device.type == "cuda" else 32)
        if batch < 2 or args.budget <= 0: raise UserError(f"batch is {batch} and budget {args.budget}; a step needs two videos, and a figure some time")
        print(bench_table(bench(args.out, published_config("tvr"), Sizes(batch), device, args.budget, args.compiled)))
    return run_command(main, parser, argv)


def features_command(argv:list|None=None)->int:
    "prvr_features: a corpus out of your own videos or captioned images."
    parser = argparse.ArgumentParser("prvr_features", allow_abbrev=False, description="Make a corpus in the released layout out of a folder. Run again to continue or to add files.")
    actions = parser.add_subparsers(dest="action", required=True)
    videos = actions.add_parser("videos", help="a folder of videos, with or without captions")
    images = actions.add_parser("images", help="a folder of captioned images, composed into videos of several shots")
    videos.add_argument("--captions", type=Path, help="video,sentence[,start,end] as CSV, TSV or JSON lines, or '<video>#enc#<k> sentence' lines; without it the videos can be searched, not trained on")
    images.add_argument("--captions", type=Path, required=True, help="image,caption as CSV (Flickr8k's captions.txt), or COCO's captions JSON")
    for action in videos, images:
        action.formatter_class = argparse.ArgumentDefaultsHelpFormatter
        action.add_argument("folder", type=Path, help="searched with its subfolders")
        action.add_argument("--root", type=Path, default=Path("data"), help="folder that holds the collections")
        action.add_argument("--name", required=True, help="of the collection to make or to bring up to date")
        action.add_argument("--model", default=DEFAULT_MODEL, help="a CLIP or SigLIP model of the Hugging Face hub, or the folder of a saved one")
        action.add_argument("--rate", type=float, default=1., help="frames per second")
        action.add_argument("--raw-tokens", action="store_true", help="store token states before the projection into the joint space (no zero-shot retrieval then)")
        action.add_argument("--val-share", type=float, default=0.2, help="share of the captioned videos that is held out for validation")
        action.add_argument("--seed", type=int, default=0, help="of the split, and of the composition of images")

    def main(args):
        extract = extract_videos if args.action == "videos" else extract_images
        print("\n".join(extract(args.folder, args.root, args.name, args.captions, args.model, args.rate, args.raw_tokens, args.val_share, args.seed)))
    return run_command(main, parser, argv)


LEVELS = "▁▂▃▄▅▆▇█"

def strip_text(
    hit:Hit,
    low:float, # relevance that is drawn lowest
    high:float, # relevance that is drawn highest
    width:int=32, # characters, without the brackets
)->str: # relevance over the video, the moment in brackets
    "A relevance curve in one line of text."
    pooled = F.adaptive_max_pool1d(hit.curve[None], min(width, len(hit.curve)))[0]
    drawn = [LEVELS[step] for step in ((pooled - low) / max(high - low, 1e-9) * len(LEVELS)).long().clamp(0, len(LEVELS) - 1)]
    first = min(int(hit.start * len(drawn)), len(drawn) - 1)
    last = max(math.ceil(hit.end * len(drawn) - 1e-6), first + 1)
    return "".join([*drawn[:first], "[", *drawn[first:last], "]", *drawn[last:]])

def results_text(
    hits:list, # of Hit, of one query
)->list: # one line each
    "Search results as a table; the strips of one query share their scale."
    curves = torch.cat([hit.curve for hit in hits]) if hits else torch.zeros(1)
    low, high = curves.min().item(), curves.max().item()
    when = max((len(moment_text(hit)) for hit in hits), default=0)
    return [f"{rank:3d}  {hit.score:.3f}  {moment_text(hit):>{when}}  {strip_text(hit, low, high)}  {hit.title}" for rank, hit in enumerate(hits, 1)]

def result_row(
    hit:Hit,
)->dict: # for json
    "A result for machines; times in seconds when they are known."
    seconds = dict(zip(("start", "end", "peak"), hit.seconds)) if hit.seconds else None
    return {"id": hit.id, "title": hit.title, "score": hit.score, "share": {"start": hit.start, "end": hit.end, "peak": hit.peak}, "seconds": seconds, "duration": hit.duration,
            "relevance": [round(x, 4) for x in hit.curve.tolist()]}


def best_device()->str:
    "The GPU if there is one."
    return "cuda" if torch.cuda.is_available() else "cpu"

def build_action(args:argparse.Namespace)->str:
    "prvr_search build."
    if args.zero_shot and not args.dataset: raise UserError("--zero-shot needs --dataset; a checkpoint would say what it was trained on")
    model, path = (None, None) if args.zero_shot else open_checkpoint(args.checkpoint, args.dataset)
    embedder = Embedder(model, published_config(args.dataset) if args.zero_shot else None, best_device())
    index = build_index(args.index, embedder, args.root, args.dataset, args.split, args.dtype, path, args.text_model)
    return f"{args.index}: {len(index):,} videos ({args.dtype}, {index.n_bytes / 1e6:,.1f} MB); next: prvr_search --index {args.index} \"a sentence\""

def add_action(args:argparse.Namespace)->str:
    "prvr_search add."
    index = VideoIndex(args.index)
    root, dataset = first_source(index)
    added = index.append(open_embedder(index, args.checkpoint, best_device()), args.root or root, args.dataset or dataset, args.split)
    return f"{args.index}: {added:,} new videos, {len(index):,} in all"

def remove_action(args:argparse.Namespace)->str:
    "prvr_search remove."
    index = VideoIndex(args.index)
    index.remove(args.ids)
    return f"{args.index}: {len(index):,} videos are left"

def ask_action(args:argparse.Namespace)->str:
    "prvr_search ask."
    searcher = open_searcher(args.index, args.checkpoint, args.text_model, best_device())
    found = searcher.search(args.queries, args.k, args.clip_score_weight, args.fraction)
    if args.json: return json.dumps([{"query": query, "results": [result_row(hit) for hit in hits]} for query, hits in zip(args.queries, found)])
    return "\n\n".join("\n".join([query, *results_text(hits)]) for query, hits in zip(args.queries, found))

def moments_action(args:argparse.Namespace)->str:
    "prvr_search moments."
    index = VideoIndex(args.index, best_device())
    root, dataset = first_source(index)
    root, dataset = args.root or root, args.dataset or dataset
    numbers = evaluate_moments(index, open_embedder(index, args.checkpoint), root, dataset, args.split, fraction=args.fraction)
    if args.out: write_json(args.out, {"dataset": dataset, "split": args.split, "kind": index.about["kind"], "config": index.about["config"], "fraction": args.fraction, **numbers})
    return moments_text(numbers)

def latency_action(args:argparse.Namespace)->str:
    "prvr_search latency."
    from prvr_nb.speed import describe_machine
    device = best_device()
    rows = [search_latency(n, device, dtype, budget=args.budget) for dtype in DTYPES for n in args.videos]
    if args.out: write_json(args.out, {"machine": describe_machine(torch.device(device)), "rows": rows})
    return "\n".join(f"{row['videos']:7,} videos, {row['dtype']}, {row['bytes'] / 1e6:9,.0f} MB: {1000 * row['median']:9,.1f} ms" for row in rows)


def first_source(
    index:VideoIndex,
)->tuple: # root and name of a collection
    "The collection that an index was built from."
    return index.source(index.entries[0]) if index.entries else (None, None)

def moments_text(
    numbers:dict, # of moment_metrics
)->str: # a few lines
    "Moment metrics as a table, in percent."
    rows = [("", "in moment", "IoU"), ("best frame, its moment", numbers["hit"], numbers["iou"]), ("chance", numbers["hit_chance"], numbers["iou_chance"]),
            ("middle frame, middle half", numbers["hit_middle"], numbers["iou_middle"]), ("whole video", None, numbers["iou_whole"])]
    number = lambda x: "–" if x is None else x if isinstance(x, str) else f"{x:.1f}"
    return "\n".join([f"{numbers['queries']:,} queries with annotated moments, in percent"] + [f"{name:26}{number(hit):>10}{number(iou):>8}" for name, hit, iou in rows])


ACTIONS = {"build": build_action, "add": add_action, "remove": remove_action, "ask": ask_action, "moments": moments_action, "latency": latency_action}

def search_parser()->argparse.ArgumentParser:
    "The command line of prvr_search."
    parser = argparse.ArgumentParser("prvr_search", allow_abbrev=False, description="Search videos with sentences: prvr_search --index FOLDER \"a man opens the fridge\".")
    actions = parser.add_subparsers(dest="action", required=True)
    add = lambda name, help: actions.add_parser(name, help=help, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    build, more, less = add("build", "make an index"), add("add", "add videos that an index lacks"), add("remove", "forget videos")
    ask, moments = add("ask", "search (the word may be left out)"), add("moments", "compare the moments that are found with annotated ones")
    latency = add("latency", "time of a search among random videos on this machine")
    latency.add_argument("--videos", type=int, nargs="+", default=[474, 5_000, 50_000], help="sizes of the index")
    latency.add_argument("--budget", type=float, default=5., help="seconds to spend on each, about")
    for action in moments, latency: action.add_argument("--out", type=Path, help="JSON file to write")
    for action in build, more, less, ask, moments: action.add_argument("--index", required=True, type=Path, help="folder of the index")
    by = build.add_mutually_exclusive_group(required=True)
    by.add_argument("--checkpoint", type=Path, help="a run folder, its best.safetensors, or a .ckpt of the released code")
    by.add_argument("--zero-shot", action="store_true", help="no model: the teacher's own features")
    build.add_argument("--dtype", default="fp16", choices=DTYPES, help="how embeddings are stored")
    for action in build, more: action.add_argument("--split", default="all", help="all (no captions needed), train, val or test")
    moments.add_argument("--split", default="val", help="train, val or test")
    for action in build, more, moments:
        action.add_argument("--root", type=Path, default=Path("data") if action is build else None, help="folder that holds the collections; default: the index's")
        action.add_argument("--dataset", help="collection name; default: the one that the model was trained on, or the index's")
    for action in more, ask, moments: action.add_argument("--checkpoint", type=Path, help="where the model is now, if not where it was")
    for action in build, ask: action.add_argument("--text-model", help="a CLIP or SigLIP model, for collections that do not say which made them, or one that has moved")
    for action in ask, moments: action.add_argument("--fraction", type=float, default=FRACTION, help="the moment goes on while relevance is above this part of the way from its median to its peak")
    ask.add_argument("--k", type=int, default=5, help="videos per query")
    ask.add_argument("--clip-weight", type=float, help="weight of the clip score; default: the model's")
    ask.add_argument("--json", action="store_true", help="results for machines")
    ask.add_argument("queries", nargs="+", help="sentences")
    less.add_argument("ids", nargs="+", help="ids of videos")
    return parser

def search_command(argv:list|None=None)->int:
    "prvr_search: build, change and search an index."
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] not in (*ACTIONS, "-h", "--help"): argv = ["ask", *argv]
    return run_command(lambda args: print(ACTIONS[args.action](args)), search_parser(), argv)


def app_command(argv:list|None=None)->int:
    "prvr_app: the search panel as a page."
    parser = argparse.ArgumentParser("prvr_app", allow_abbrev=False, description="Serve the search panel as a page on this machine; without --index a demonstration on toy videos, which is made first.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--index", type=Path, action="append", help="folder of an index; several become columns side by side")
    parser.add_argument("--port", type=int, default=8866, help="of the page")
    parser.add_argument("--folder", type=Path, default=Path("runs/app"), help="of the demonstration")

    def main(args):
        check_app()
        check_port(args.port)
        if not args.index: print(f"The demonstration lies in {args.folder}; the first time it takes a minute to train its two models.", flush=True)
        indexes = index_names(args.index) if args.index else demo_indexes(args.folder, quiet=False)
        open_searchers(indexes) # a mistake ends here, not in the browser
        token = secrets.token_urlsafe(24)
        print(f"Open http://127.0.0.1:{args.port}/?token={token} (stop with Ctrl-C)", flush=True)
        with TemporaryDirectory() as folder: serve(write_page(Path(folder)/"search.ipynb", indexes, not args.index), args.port, token)
    return run_command(main, parser, argv)


def collapse_command(argv:list|None=None)->int:
    "prvr_collapse: baseline and full method, watched epoch by epoch."
    parser = argparse.ArgumentParser("prvr_collapse", allow_abbrev=False, description="Train baseline and full method without early stopping and keep, after every epoch, similarities and neighbours of some validation queries and the collapse numbers of all. What is there already is kept.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--root", required=True, type=Path, help="folder that holds the collections")
    parser.add_argument("--out", required=True, type=Path, help="folder for two files per run")
    parser.add_argument("--seed", type=int, default=0, help="of both runs")
    add_config_flags(parser, without=("seed", *ROW_SWITCHES))

    def main(args):
        for name, settings in RECORDED.items():
            path = args.out/f"{name}_seed{args.seed}.json"
            record_once(published_config(**{**given_settings(args), **settings}), args.root, path)
            print(f"{path} and {path.with_suffix('.npz').name} are ready")
    return run_command(main, parser, argv)
