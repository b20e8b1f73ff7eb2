"""What preparing, training, evaluating and searching cost on this machine, measured with random features."""
import os
import platform
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import timer # waits for the GPU, then reads the clock
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from prvr_nb.config import Config
from prvr_nb.data.corpus import Split
from prvr_nb.data.prepared import PreparedSplit, pack_queries
from prvr_nb.evaluation.rows import metrics_row
from prvr_nb.evidence.experiments import machine
from prvr_nb.files import UserError, write_json
from prvr_nb.method.model import Embeddings, Videos, prepare_videos
from prvr_nb.training.fast import fast_tcpl_loss, keep_freed_memory
from prvr_nb.training.loop import Run, build_run, load_batches, step_losses, update
from prvr_nb.training.resume import TrainState
from prvr_nb.videos.engines import ENGINES, Tokens
from prvr_nb.videos.index import FORMAT, Entry, VideoIndex, write_index
from prvr_nb.videos.search import search

METHODS = {"baseline": dict(tcpl=False, cbva=False), "full": {}} # L_base and the whole method, on the same tokens
LOSSES = {"retrieval": METHODS["baseline"], "tcpl": dict(cbva=False), "cbva": dict(tcpl=False), "all": {}}

class Sizes(NamedTuple):
    "What is measured."
    batch:int # B
    per_video:int=5 # queries of each video
    width:int=768 # of the features
    videos:int=1000 # to prepare
    tcpl:tuple=(160, 320, 640, 1280, 2560) # numbers of queries
    evaluations:dict={"qvhighlight": (1550, 474), "tvr": (10895, 2179), "activitynet": (17505, 4917)} # queries, videos

def line_of(path:str, start:str)->str: # what follows the start; '' where the system has no such file or line
    "A line of a file of the Linux kernel."
    try:
        with open(path) as file:
            return next((line[len(start):].strip(" \t:\n") for line in file if line.startswith(start)), "")
    except OSError:
        return ""

def describe_machine(device:torch.device)->dict: # words and numbers, without the machine's name
    "What the numbers were measured on, and which sources: '-dirty' when files differ from the commit."
    cpu = line_of("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return {**machine(), "device": name, "type": device.type, "cpu": cpu, "commit": commit,
            "capability": torch.backends.cpu.get_cpu_capability()}

def measure(functions:dict, budget:float, most:int=50, least:int=0)->dict: # seconds to spend on each; repeats
    "Times of several functions in turn, so that a machine that slows down does so for all; the first round warms up."
    def once(function):
        start = timer()
        function()
        return timer() - start
    times = {name: [once(f)] for name, f in functions.items()} # kept only if the budget allows no more
    rounds = max(least, min(most, int(budget * len(functions) / sum(t for t, in times.values()))))
    times = {name: [] for name in functions} if rounds else times
    for _ in range(rounds):
        for name, f in functions.items():
            times[name].append(once(f))
    return {name: {"median": statistics.median(t), "low": min(t), "high": max(t), "repeats": len(t)}
            for name, t in times.items()}

def extra_memory(function:Callable, device:torch.device)->int: # bytes
    "Highest memory of tensors during a call, beyond what was in use before."
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99") # the profiler's notes would stand among ours
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    events = sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events if event.name() == "[memory]"), initial=0))

def random_arrays(n:int, low:int, high:int, width:int)->list: # of n float32 arrays, low to high − 1 rows each
    "Features of n videos or queries."
    rng = np.random.default_rng(0)
    return [rng.standard_normal((int(rng.integers(low, high)), width), dtype=np.float32) for _ in range(n)]

def random_corpus(config:Config, n_videos:int, per_video:int, width:int)->PreparedSplit: # on the CPU
    "Random features of the right shapes: 8 to 24 tokens a query, 20 to 200 frames a video."
    owner = np.arange(n_videos).repeat(per_video)
    videos = Videos(*prepare_videos(random_arrays(n_videos, 20, 201, width), config))
    queries = pack_queries(random_arrays(len(owner), 8, 25, width), owner)
    if config.precision == "bf16":
        videos = videos._replace(frames=videos.frames.half(), clips=videos.clips.half())
        queries = queries._replace(tokens=queries.tokens.half())
    return PreparedSplit(Split(None, [], [f"video {i}" for i in range(n_videos)], owner), videos, queries)

def one_step(run:Run):
    "What train_epoch does for one batch, of the first videos."
    step = (torch.arange(run.config.batch_size),)
    batch, = load_batches(run, [step])
    update(run, step_losses(run, batch, step, TrainState(epoch=run.config.hard_negative_start_epoch)))

def loss_calls(run:Run)->dict: # name → forward and backward pass of these losses alone, from given embeddings
    "The losses without the encoders; 'tcpl' and 'cbva' include the retrieval losses, to be subtracted."
    model, epoch = run.accelerator.unwrap_model(run.model), run.config.hard_negative_start_epoch
    batch, = load_batches(run, [(torch.arange(run.config.batch_size),)])
    with torch.no_grad():
        made = run.model(batch)
    e = Embeddings(*(x.float().requires_grad_() for x in made))
    def call(changes):
        sum(run.losses(model, e, batch, replace(run.config, **changes), epoch).values()).backward()
    return {name: lambda changes=changes: call(changes) for name, changes in LOSSES.items()}

def flops_of_step(run:Run)->int: # of all matrix products, forward and backward; element-wise work is not counted
    "Floating point operations of one step."
    with FlopCounterMode(display=False) as counter:
        one_step(run)
    return counter.get_total_flops()

def bench_steps(config:Config, corpus:PreparedSplit, budget:float)->dict:
    "Training steps of baseline and full method in turn, losses of the full method, FLOPs."
    runs = {name: build_run(replace(config, **changes), corpus, None)[0] for name, changes in METHODS.items()}
    return {"steps": measure({name: lambda run=run: one_step(run) for name, run in runs.items()}, budget, least=5),
            "losses": measure(loss_calls(runs["full"]), budget),
            "flops": None if config.compile else {name: flops_of_step(run) for name, run in runs.items()}}

def matrix_rate(precision:str, device:torch.device, budget:float)->float: # operations per second
    "The best rate of a large square matrix product: what the machine can do, measured."
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return 2 * n**3 / measure({"product": lambda: a @ a}, budget)["product"]["low"]

def tcpl_call(n_queries:int, device:torch.device)->Callable:
    "Forward and backward pass of the TCPL that training takes, on random queries."
    student = torch.randn(n_queries, 384, device=device, requires_grad=True)
    teacher = F.normalize(torch.randn(n_queries, 768, device=device), dim=-1)
    return lambda: fast_tcpl_loss(student, teacher).backward()

def bench_tcpl(n_queries:int, device:torch.device, budget:float)->dict: # times and extra bytes
    "TCPL alone, forward and backward, and the memory it adds."
    call = tcpl_call(n_queries, device)
    return {**measure({"tcpl": call}, budget)["tcpl"], "extra_bytes": extra_memory(call, device)}

def bench_evaluation(config:Config, n_queries:int, n_videos:int, device:torch.device, budget:float)->dict:
    "All metrics of a split from given embeddings: ranks, collapse, correlation with the teacher."
    shapes = (n_queries,), (n_videos, config.n_frames), (n_videos, config.n_clips)
    e = Embeddings(*(F.normalize(torch.randn(*shape, config.hidden_size, device=device), dim=-1) for shape in shapes))
    owner = np.sort(np.arange(n_queries) % n_videos)
    corpus = PreparedSplit(Split(None, [], [], owner), None, pack_queries(random_arrays(n_queries, 1, 2, 768), owner))
    times = measure({"all": lambda: metrics_row(e, corpus, config.clip_score_weight)}, budget)["all"]
    return {"queries": n_queries, "videos": n_videos, **times}

def bench(out:str|Path, config:Config, sizes:Sizes, device:torch.device, budget:float=5., compiled:bool=True,
          quiet:bool=False)->dict: # seconds for each figure, about; whether to measure compiled encoders too
    "Measure everything and write it down as one JSON file; nothing is written when a part fails."
    keep_freed_memory()
    config = replace(config, batch_size=sizes.batch)
    arrays = random_arrays(sizes.videos, 20, 201, sizes.width)
    def steps(precision, compiled):
        c = replace(config, precision=precision, compile=compiled)
        return bench_steps(c, random_corpus(c, sizes.batch, sizes.per_video, sizes.width), budget)
    def prepare():
        return [prepare_videos(arrays[i:i + 64], config) for i in range(0, sizes.videos, 64)]
    work = {"prepare": lambda: {"videos": sizes.videos, "width": sizes.width, **measure({"": prepare}, budget)[""]},
            "matrix_rate": lambda: {p: matrix_rate(p, device, budget) for p in ("fp32", "bf16")},
            **{f"{p} {'compiled' if c else 'eager'}": lambda p=p, c=c: steps(p, c)
               for c in (False, True)[:1 + compiled] for p in ("fp32", "bf16")},
            "tcpl": lambda: {str(q): bench_tcpl(q, device, budget) for q in sizes.tcpl},
            "evaluation": lambda: {name: bench_evaluation(config, *size, device, budget)
                                   for name, size in sizes.evaluations.items()}}
    result = {"machine": describe_machine(device), "sizes": sizes._asdict()}
    for part, run in (bar := tqdm(work.items(), desc="bench", disable=quiet or None)):
        bar.set_postfix_str(part)
        result[part] = run()
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    return result

def bench_table(result:dict)->str: # what bench wrote → lines
    "The figures of one machine, for people."
    def ms(entry):
        return f"{1000 * entry['median']:,.1f} ms"
    about, prepare = result["machine"], result["prepare"]
    lines = [f"{about['device']}, {about['threads']} threads, torch {about['torch']}, commit {about['commit']}; "
             f"B = {result['sizes']['batch']}", f"prepare {prepare['videos']:,} videos: {ms(prepare)}"]
    for variant in (name for name in result if name.endswith((" eager", " compiled"))):
        base, full = (result[variant]["steps"][name] for name in METHODS)
        times = full["median"] / base["median"]
        lines.append(f"step, {variant}: baseline {ms(base)}, full {ms(full)} ({times:.2f} times)")
    lines += [f"TCPL, Q = {q}: {ms(e)}, {e['extra_bytes'] / 2**20:.0f} MiB extra" for q, e in result["tcpl"].items()]
    lines += [f"evaluation, {e['queries']} × {e['videos']}: {ms(e)}" for e in result["evaluation"].values()]
    return "\n".join(lines)

def random_index(folder:Path, n_videos:int, engine:str)->VideoIndex: # 128 frame and 32 clip tokens of width 384 a video
    "An index of random embeddings, to measure with."
    filled, rng = ENGINES[engine](folder), np.random.default_rng(0)
    def rows(n):
        x = rng.standard_normal((n, 384), dtype=np.float32)
        return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    folder.mkdir(parents=True)
    filled.add(Tokens(rows(128), rows(32)) for _ in range(n_videos))
    about = {"format": FORMAT, "kind": "model", "fingerprint": "", "clip_score_weight": 0.4, "checkpoint": None,
             "config": {}, "text": None, "sources": [{"root": ".", "dataset": "random"}]}
    write_index(folder, about, [Entry(f"video {i}", f"video {i}", None, None, 128, 0, [4] * 32)
                                for i in range(n_videos)], filled)
    return VideoIndex(folder)

def search_latency(n_videos:int, engine:str="faiss", budget:float=5.)->dict: # or 'faiss-hnsw'; seconds to spend, about
    "Time of a search for ten videos among random ones, from a query's embedding to the moments; files read before."
    need, known = n_videos * 2 * (128 + 32) * 384, line_of("/proc/meminfo", "MemAvailable")
    if known and 1.2 * need > (free := int(known.split()[0]) * 1024):
        raise UserError(f"{n_videos:,} videos take {need / 1e9:.1f} GB; only {free / 1e9:.1f} GB of memory are free")
    with TemporaryDirectory() as scratch:
        index = random_index(Path(scratch)/"index", n_videos, engine)
        query = F.normalize(torch.randn(1, 384), dim=-1)
        times = measure({"search": lambda: search(index, query, 10)}, budget)["search"]
    return {"videos": n_videos, "queries": 1, "k": 10, "engine": engine, "bytes": need, **times}
