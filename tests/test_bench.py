"""The benchmark measures what training runs, counts what a pen counts, and writes one complete file. No time is asserted."""
import json

import pytest
import torch

from prvr_nb.speed import (
    Sizes, bench, bench_table, extra_memory, flops_of_step, in_new_process, loss_calls, make_run, measure, one_step,
    random_corpus, step_parts, tcpl_memory,
)
from prvr_nb.config import published_config

CPU = torch.device("cpu")
TINY = Sizes(batch=3, per_video=2, width=24, videos=5, tcpl=(6, 9), evaluations={"small": (20, 7)})


@pytest.fixture(scope="module")
def config():
    return published_config("toy", hidden_size=16, heads=2, batch_size=3)


@pytest.fixture(scope="module")
def written(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("bench") / "deep" / "cpu.json"
    result = bench(path, config, TINY, CPU, budget=0.01, compiled=False, quiet=True)
    return path, result


def test_the_table_names_every_figure(written):
    table = bench_table(written[1])
    for expected in "prepare:", "step, fp32 eager", "step, bf16 eager", "Q =     6", "evaluation, 20 × 7":
        assert expected in table


def test_the_file_holds_every_part(written):
    path, result = written
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert {"machine", "prepare", "matrix_rate", "fp32 eager", "bf16 eager", "step_memory", "tcpl", "evaluation"} <= result.keys()
    for variant in "fp32 eager", "bf16 eager":
        assert result[variant]["steps"].keys() == {"baseline", "full"}
        assert result[variant]["parts"].keys() == {"batch", "encoders", "losses", "backward", "optimiser"}
        assert result[variant]["flops"]["full"] > result[variant]["flops"]["baseline"] > 0
    assert result["tcpl"].keys() == {"6", "9"} and result["evaluation"]["small"]["queries"] == 20
    assert result["machine"]["torch"] == torch.__version__ and "node" not in result["machine"]


def test_measuring_takes_turns_and_counts_repeats():
    calls = []
    times = measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, budget=1., most=4)
    assert calls == ["a", "b"] * 5 and times["a"]["repeats"] == 4  # the first round warms up
    assert times["a"]["low"] <= times["a"]["median"] <= times["a"]["high"]


def test_one_call_is_enough_when_the_budget_allows_no_more():
    calls = []
    assert measure({"a": lambda: calls.append("a")}, CPU, budget=0.)["a"]["repeats"] == len(calls) == 1


def test_flops_are_those_of_the_matrix_products(config):
    """Doubling the batch doubles the encoders' products; the angle cosines are no product."""
    count = lambda batch: flops_of_step(make_run(published_config("toy", hidden_size=16, heads=2, batch_size=batch, tcpl=False, cbva=False), random_corpus(config, 4, 2, 24), CPU))
    lengths = random_corpus(config, 4, 2, 24).queries.start.diff()
    assert 1.7 < count(4) / count(2) < 2.6, lengths  # scores grow with the square, padding by chance


def test_a_measured_step_is_a_training_step(config):
    run = make_run(config, random_corpus(config, 3, 2, 24), CPU)
    before = [p.detach().clone() for p in run.model.parameters()]
    one_step(run)
    assert sum(not torch.equal(a, b) for a, b in zip(before, run.model.parameters())) > 0.9 * len(before)
    assert step_parts(run).keys() == {"batch", "encoders", "losses", "backward", "optimiser"}
    for call in loss_calls(run).values():
        call()


def test_half_features_are_measured_with_bf16(config):
    assert random_corpus(published_config("toy", precision="bf16"), 2, 2, 24).videos.frames.dtype == torch.float16
    assert random_corpus(config, 2, 2, 24).videos.frames.dtype == torch.float32


def allocate(n_bytes):
    return extra_memory(lambda: torch.ones(n_bytes // 4).sum(), CPU)


def test_memory_is_what_a_call_adds():
    assert 0.95 * 2**28 < in_new_process(allocate, 2**28) < 1.2 * 2**28


def test_tcpl_memory_grows_with_the_queries():
    assert in_new_process(tcpl_memory, 512, CPU) > in_new_process(tcpl_memory, 64, CPU) >= 0

