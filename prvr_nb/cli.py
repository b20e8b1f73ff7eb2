"""The commands. Nobody imports this module; it imports a command's modules when it runs, so that help comes at once."""
import argparse
import json
import secrets
import sys
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from prvr_nb.commands import actions_of, alias, command, config_flags, flag, given_settings, say, seconds
from prvr_nb.config import published_config, read_config
from prvr_nb.data.download import PACKS, download
from prvr_nb.files import UserError, write_json
from prvr_nb.videos.clip import DEFAULT_MODEL

ROOT = "folder that holds the datasets"
MODEL = "a run folder, its best.safetensors, or a .ckpt of the released code"
ROW_SWITCHES = ("tcpl", "cbva", "adaptive", "uniform_clips") # what the rows of an experiment differ in
FRACTION, ENGINES = 0.3, ("faiss", "faiss-hnsw") # as in videos.moments and videos.engines: help waits for neither

@command
def data_command(parser):
    "Corpora on disk: fetch, check or make one."
    fetch, look, toy = actions_of(
        parser, download="fetch one of the authors' feature packs (needs gdown)",
        check="read every feature and report everything that is missing", toy="write the toy corpus")
    fetch.add_argument("dataset", help=", ".join(PACKS))
    flag(fetch, "--url", None, "another place to fetch the archive from")
    look.add_argument("dataset", help="name of its folder in --root")
    flag(look, "--limit", 20, "findings shown at most")
    flag(toy, "--seed", 0, "of its world and stories")
    for action in fetch, look, toy:
        flag(action, "--root", Path("data"), ROOT)

    def main(args):
        if args.action == "download":
            folder = download(args.dataset, args.root, args.url)
            return f"{folder} is ready; next: prvr_data check {args.dataset} --root {args.root}"
        if args.action == "check":
            from prvr_nb.data.corpus import check_corpus
            return "\n".join(check_corpus(args.root, args.dataset, limit=args.limit))
        from prvr_nb.data.toy import write_toy
        folder = write_toy(args.root, seed=args.seed)
        return f"{folder} is ready; next: prvr_train --dataset toy --root {args.root} --out runs/toy"
    return main

@command
def features_command(parser):
    "Make a corpus in the released layout out of a folder. Run again to continue or to add files."
    videos, images = actions_of(parser, videos="a folder of videos, with or without captions",
                                images="a folder of captioned images, composed into videos of several shots")
    flag(videos, "--captions", None, "video,sentence[,start,end] as CSV, TSV or JSON lines, or lines '<video>#enc#<k> "
                                     "sentence'; without it the videos can be searched, not trained on", type=Path)
    flag(images, "--captions", Path, "image,caption as CSV (Flickr8k's captions.txt), or COCO's captions JSON")
    for action in videos, images:
        action.add_argument("folder", type=Path, help="searched with its subfolders")
        flag(action, "--root", Path("data"), ROOT)
        name = action.add_mutually_exclusive_group(required=True)
        flag(name, "--dataset", None, "name of the corpus to make or to bring up to date")
        alias(name, "--name", "dataset")
        flag(action, "--model", DEFAULT_MODEL, "CLIP or SigLIP model of the Hugging Face hub, or a saved one's folder")
        flag(action, "--rate", 1., "frames per second")
        flag(action, "--raw-tokens", False, "store token states before the projection into the joint space")
        flag(action, "--val-share", 0.2, "share of the captioned videos that is held out for validation")
        flag(action, "--seed", 0, "of the split, and of the composition of images")

    def main(args):
        from prvr_nb.videos.features import extract_videos
        from prvr_nb.videos.images import extract_images
        extract = extract_videos if args.action == "videos" else extract_images
        return "\n".join(extract(args.folder, args.root, args.dataset, args.captions, args.model, rate=args.rate,
                                 raw_tokens=args.raw_tokens, val_share=args.val_share, seed=args.seed))
    return main

@command
def train_command(parser):
    "Train on a dataset and evaluate the best epoch on its validation split."
    flag(parser, "--root", Path, ROOT)
    flag(parser, "--out", Path, "run folder to make")
    flag(parser, "--resume", False, "continue the run in --out, with its settings; without one there, start it")
    alias(parser, "--checkpoint-seconds", "checkpoint_seconds", type=seconds)
    config_flags(parser)

    def main(args):
        path, given = args.out/"config.json", given_settings(args)
        goes_on = args.resume and path.exists()
        config = replace(read_config(path), **given) if goes_on else published_config(**given)
        from prvr_nb.evaluation.report import text_table
        from prvr_nb.training.distributed import find_processes
        from prvr_nb.training.loop import train
        if find_processes().is_main_process:
            say(json.dumps(asdict(config), indent=1))
            if hasattr(args, "checkpoint_seconds"):
                say("--checkpoint-seconds has no effect any more: a state is saved after every epoch")
        rows = train(config, args.root, args.out, resume=args.resume)
        return text_table(rows) if rows else None # one of several processes has them
    return main

@command
def eval_command(parser):
    "Evaluate a checkpoint on a split; prints the table and, with --out, writes metrics.json."
    flag(parser, "--checkpoint", Path, MODEL)
    flag(parser, "--root", Path, ROOT)
    flag(parser, "--dataset", None, "default: the one trained on; a .ckpt takes its published settings")
    flag(parser, "--split", "val", "train, val or test")
    flag(parser, "--out", None, "folder for metrics.json", type=Path)

    def main(args):
        from prvr_nb.data.prepared import prepare
        from prvr_nb.evaluation.report import text_table
        from prvr_nb.evaluation.rows import evaluate, zero_shot
        from prvr_nb.training.checkpoints import open_checkpoint
        from prvr_nb.training.distributed import find_processes
        if args.out: # before anything is computed
            if (args.out/"history.jsonl").exists():
                raise UserError(f"{args.out} holds a run with its own metrics.json; choose another --out")
            args.out.mkdir(parents=True, exist_ok=True)
        model, path = open_checkpoint(args.checkpoint, args.dataset)
        config = replace(model.config, dataset=args.dataset or model.config.dataset)
        corpus, = prepare(args.root, config, (args.split,))
        device = find_processes().device
        rows = zero_shot(corpus, device) + [{"name": path.resolve().parent.name, **evaluate(model, corpus, device)}]
        if args.out:
            write_json(args.out/"metrics.json", {"rows": rows, "split": args.split, "checkpoint": str(path)})
        return text_table(rows)
    return main

@command
def demo_command(parser):
    "Write the toy corpus, train baseline and full method on it, compare them."
    flag(parser, "--root", Path("data"), ROOT)
    flag(parser, "--out", Path("runs/demo"), "folder for runs, metrics.json and report.html; an older demo is replaced")
    config_flags(parser, without=("dataset", *ROW_SWITCHES))

    def main(args):
        from prvr_nb.demo import run_demo
        from prvr_nb.evaluation.report import text_table
        table = text_table(run_demo(args.root, args.out, **given_settings(args)))
        return (f"{table}\nThe table is in {args.out/'metrics.json'}; curves, similarity maps and ranked examples are "
                f"in {args.out/'report.html'}.")
    return main

@command
def experiment_command(parser):
    """Train every row of an experiment with several seeds, the epoch chosen on training videos that are held out; one
    small JSON file per run. Continues where it was stopped."""
    parser.add_argument("experiment", choices=("choice", "ablation", "sensitivity"),
                        help="width and learning rate of the baseline; rows of the paper's Table 1 with controls; "
                             "the full method with one setting changed at a time")
    flag(parser, "--root", Path, ROOT)
    flag(parser, "--out", Path, "folder for the JSON files")
    flag(parser, "--seeds", 1, "runs per row")
    flag(parser, "--held-out", 0.15, "share of the training videos that choose the epoch")
    config_flags(parser, without=("seed", "variant", "pooling", *ROW_SWITCHES))

    def main(args):
        from prvr_nb.evidence.experiments import run_experiment
        given = {"dataset": "toy", **given_settings(args)}
        run_experiment(args.experiment, given.pop("dataset"), args.root, args.out, args.seeds, args.held_out, **given)
    return main

@command
def collapse_command(parser):
    """Train baseline and full method without early stopping and keep, after every epoch, similarities and neighbours of
    some validation queries and the collapse numbers of all. What is there already is kept."""
    flag(parser, "--root", Path, ROOT)
    flag(parser, "--out", Path, "folder for two files per run")
    flag(parser, "--seed", 0, "of both runs")
    config_flags(parser, without=("seed", *ROW_SWITCHES))

    def main(args):
        from prvr_nb.evidence.recordings import RECORDED, record_once
        for name, settings in RECORDED.items():
            path = args.out/f"{name}_seed{args.seed}.json"
            record_once(published_config(**{**given_settings(args), **settings}), args.root, path)
            say(f"{path} and {path.with_suffix('.npz').name} are ready")
    return main

@command
def bench_command(parser):
    """Measure preparing, training steps (baseline and full method in turn), TCPL and evaluation with random features of
    the published sizes; writes one JSON file."""
    flag(parser, "--out", Path, "JSON file to write, e.g. runs/bench/mine.json")
    flag(parser, "--batch-size", None, "videos a step, five queries each; default: 128 on a GPU, 32 on a CPU", type=int)
    alias(parser, "--batch", "batch_size", type=int)
    flag(parser, "--budget", 5., "seconds to spend on each figure, about", type=seconds)
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True,
                        help="measure compiled encoders too (compiling takes minutes)")

    def main(args):
        from accelerate import PartialState

        from prvr_nb.speed import Sizes, bench, bench_table
        device = PartialState().device
        batch = args.batch_size or (128 if device.type == "cuda" else 32)
        if batch < 2 or args.budget <= 0:
            raise UserError(f"batch size {batch}, budget {args.budget}; a step needs two videos, a figure some time")
        config = published_config("tvr")
        return bench_table(bench(args.out, config, Sizes(batch), device, args.budget, args.compiled))
    return main

ACTIONS = {"build": "make an index", "add": "add videos that an index lacks", "remove": "forget videos",
           "ask": "search (the word may be left out)", "moments": "compare found moments with annotated ones",
           "latency": "time of a search among random videos on this machine"}

@command
def search_actions(parser):
    "Search videos with sentences: prvr_search --index FOLDER 'a man opens the fridge'."
    build, more, less, ask, moments, latency = actions_of(parser, **ACTIONS)
    for action in build, more, less, ask, moments:
        flag(action, "--index", Path, "folder of the index")
    by = build.add_mutually_exclusive_group(required=True)
    flag(by, "--checkpoint", None, MODEL, type=Path)
    flag(by, "--zero-shot", False, "no model: the teacher's own features")
    flag(build, "--engine", "faiss", "what finds the nearest vectors; faiss-hnsw: from some 50,000 videos on, inexact",
         choices=ENGINES)
    for action in build, more, moments:
        flag(action, "--split", "val" if action is moments else "all", "train, val, test, or all (an index)")
        flag(action, "--root", Path("data") if action is build else None, ROOT + "; or the index's own", type=Path)
        flag(action, "--dataset", None, "default: the one that the model was trained on, or the index's")
    for action in more, ask, moments:
        flag(action, "--checkpoint", None, "where the model is now, if not where it was", type=Path)
    for action in build, ask:
        flag(action, "--text-model", None, "CLIP or SigLIP model, where features do not name theirs or it has moved")
    for action in ask, moments:
        flag(action, "--fraction", FRACTION, "a moment's relevance is above this part of the way from median to peak")
    flag(ask, "--k", 5, "videos per query")
    flag(ask, "--clip-score-weight", None, "weight of the clip score; default: the model's", type=float)
    alias(ask, "--clip-weight", "clip_score_weight", type=float)
    flag(ask, "--json", False, "results for machines")
    ask.add_argument("queries", nargs="+", help="sentences")
    less.add_argument("ids", nargs="+", help="names or ids of videos")
    for action in moments, latency:
        flag(action, "--out", None, "JSON file to write", type=Path)
    flag(latency, "--videos", [474, 5_000, 50_000], "sizes of the index", type=int, nargs="+")
    flag(latency, "--budget", 5., "seconds to spend on each, about", type=seconds)

    def main(args):
        import torch

        from prvr_nb.videos import actions
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if args.action != "latency":
            return getattr(actions, args.action)(args, device)
        from prvr_nb.speed import describe_machine, search_latency
        rows = [search_latency(n, budget=args.budget) for n in args.videos]
        if args.out:
            write_json(args.out, {"machine": describe_machine(torch.device(device)), "rows": rows})
        return actions.latency_text(rows)
    return main

def search_command(argv:list|None=None)->int:
    "prvr_search; what does not begin with an action is a question."
    argv = sys.argv[1:] if argv is None else argv
    return search_actions(["ask", *argv] if argv and argv[0] not in (*ACTIONS, "-h", "--help") else argv)

@command
def app_command(parser):
    """Serve the search panel as a page on this machine; without --index a demonstration on toy videos, which is made
    first."""
    flag(parser, "--index", None, "folder of an index; several become columns side by side", type=Path, action="append")
    flag(parser, "--port", 8866, "of the page")
    flag(parser, "--folder", Path("runs/app"), "of the demonstration")

    def main(args):
        from prvr_nb.app import check_app, check_port, index_names, serve, write_page
        from prvr_nb.demo import demo_indexes
        from prvr_nb.videos.search import open_searchers
        check_app()
        port = check_port(args.port)
        if not args.index:
            say(f"The demonstration lies in {args.folder}; the first time it takes a minute to train its two models.")
        indexes = index_names(args.index) if args.index else demo_indexes(args.folder, quiet=False)
        open_searchers(indexes) # a mistake ends here, not in the browser
        token = secrets.token_urlsafe(24)
        say(f"Open http://127.0.0.1:{port}/?token={token} (stop with Ctrl-C)")
        with TemporaryDirectory() as folder:
            serve(write_page(Path(folder)/"search.ipynb", indexes, not args.index), port, token)
    return main
