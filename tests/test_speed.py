"""The benchmark measures what training runs, counts what a pen counts, and writes one file. No time is asserted."""
import json

import numpy as np
import pytest
import torch

from prvr_nb.config import published_config
from prvr_nb.speed import (
    Sizes,
    bench,
    bench_table,
    extra_memory,
    flops_of_step,
    loss_calls,
    measure,
    one_step,
    random_corpus,
    search_latency,
)
from prvr_nb.training.loop import build_run

CPU = torch.device("cpu")


def small(**settings):
    return published_config("toy", **{"hidden_size": 16, "heads": 2, "batch_size": 3, **settings})


def test_the_file_holds_every_part_and_the_table_names_it(tmp_path):
    path = tmp_path / "deep" / "cpu.json"
    sizes = Sizes(batch=3, per_video=2, width=24, videos=5, tcpl=(6,), evaluations={"small": (20, 7)})
    result = bench(path, small(), sizes, CPU, budget=0.01, compiled=False, quiet=True)
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert {"machine", "prepare", "matrix_rate", "fp32 eager", "bf16 eager", "tcpl", "evaluation"} <= result.keys()
    for variant in "fp32 eager", "bf16 eager":
        assert result[variant]["steps"].keys() == {"baseline", "full"}
        assert result[variant]["flops"]["full"] > result[variant]["flops"]["baseline"] > 0
    assert result["machine"]["torch"] == torch.__version__ and "node" not in result["machine"]
    for expected in "prepare 5 videos", "step, fp32 eager", "step, bf16 eager", "Q = 6", "evaluation, 20 × 7":
        assert expected in bench_table(result)


def test_measuring_takes_turns_and_counts_repeats():
    calls = []
    times = measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, budget=1., most=4)
    assert calls == ["a", "b"] * 5 and times["a"]["repeats"] == 4  # the first round warms up
    assert times["a"]["low"] <= times["a"]["median"] <= times["a"]["high"]
    assert measure({"a": lambda: calls.append("a")}, budget=0.)["a"]["repeats"] == 1 and len(calls) == 11


def test_flops_are_those_of_the_matrix_products():
    def count(batch):
        config = small(batch_size=batch, tcpl=False, cbva=False)
        return flops_of_step(build_run(config, random_corpus(config, 4, 2, 24), None)[0])
    assert 1.7 < count(4) / count(2) < 2.6  # scores grow with the square, padding by chance


@pytest.mark.parametrize("precision, stored", [("fp32", torch.float32), ("bf16", torch.float16)])
def test_a_measured_step_is_a_training_step(precision, stored):
    corpus = random_corpus(small(precision=precision), 3, 2, 24)
    assert corpus.videos.frames.dtype == stored
    run, _ = build_run(small(precision=precision), corpus, None)
    one_step(run)  # the first step of a warm-up moves nothing yet, but every part has a gradient
    assert np.mean([p.grad is not None and bool(p.grad.any()) for p in run.model.parameters()]) > 0.9
    for call in loss_calls(run).values():
        call()


def test_memory_is_what_a_call_adds():
    def call():
        one = torch.ones(2**20)
        two = one + one  # both at once
        del one
        return torch.cat([two, two[:5]])  # no more than two at any time
    assert 2 * 2**22 <= extra_memory(call, CPU) < 2.1 * 2**22


def test_a_search_among_random_videos_is_measured():
    row = search_latency(3, budget=0.01)
    assert row["videos"] == 3 and row["bytes"] == 3 * 2 * 160 * 384 and 0 < row["low"] <= row["median"]
