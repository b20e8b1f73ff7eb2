"""Child processes of tests: forked from a server that has imported the package once, so each starts in milliseconds."""
import multiprocessing
import os
import sys
import traceback

from conftest import free_port

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "prvr_nb.training.loop", "prvr_nb.cli", "prvr_nb.evaluation.report",
                                "torch._dynamo", "torch.distributed.fsdp", "torch.utils.tensorboard"])


def child(function, arguments, rank, world, port):
    "Runs in the child, on the CPU; an error is printed, where pytest shows it, and gives exit status 1."
    os.environ.update(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    if world > 1: # what a launcher tells a process
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch
    torch.set_num_threads(1)
    try:
        function(*arguments)
    except SystemExit as stop:
        sys.stderr.flush()
        os._exit(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    if world > 1 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def start(function, *arguments, world=1):
    "Start the function in `world` processes; it must be importable."
    port = free_port() if world > 1 else 0
    started = [CONTEXT.Process(target=child, args=(function, arguments, rank, world, port)) for rank in range(world)]
    for process in started:
        process.start()
    return started


def run(function, *arguments, world=1, seconds=300):
    "Run the function in `world` processes to its end."
    started = start(function, *arguments, world=world)
    for process in started:
        process.join(seconds)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    assert codes == [0] * world, f"exit codes {codes}"
