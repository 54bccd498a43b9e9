"""Checks that start train.py in other processes. Each returns its figures, as a dict."""

import json
import signal
import subprocess
import sys
import time

from tests.gpu.place import ROOT, run_python

N_ROWS = 64  # of each split

# The embedded model within a limit of memory: the card's, or this process's. A short run comes
# first, so that nothing is imported or prepared within the limit, and a large tensor is what does
# not fit. If a small allocation in a C library failed, the process could end without a word.
LIMITED = """
import sys
from contextlib import nullcontext
import torch
import train
from minia3.training.memory_fit import limited_memory
device, n_bytes, folder, *flags = sys.argv[1:]
common = ["--device", device, "--dtype", "float32", "--steps", "1"]
assert train.main([*common, "--out", folder + "-first", *flags[:2]]) == 0
if device == "cpu":
    limit = limited_memory(int(n_bytes))
else:
    card = torch.empty(0, device=device).device  # with its number, which CUDA demands
    module = getattr(torch, card.type)
    total = module.get_device_properties(card).total_memory
    module.set_per_process_memory_fraction(int(n_bytes) / total, card)
    limit = nullcontext()
with limit:
    code = train.main([*common, "--out", folder, *flags])
sys.exit(code)
"""


def few_rows(folder):
    """Return a task with few rows of the embedded one, because no check is about evaluation."""
    task = folder / "few-rows"
    task.mkdir()
    for split in ("train", "validation", "test"):
        lines = (ROOT / "data" / "same-colour" / f"{split}.jsonl").read_text().splitlines(True)
        (task / f"{split}.jsonl").write_text("".join(lines[:N_ROWS]))
    return task


def deterministic(place, folder):
    """With --deterministic, a run that is killed and resumed has the bits of one that is not."""
    n_steps = 20 if place.is_dry else 200
    flags = ["--task", few_rows(folder), "--device", place.device, "--steps", n_steps]
    flags += ["--deterministic", "--dropout", 0.1]
    flags += ["--save-every", 5, "--dtype", "float32" if place.is_dry else "bfloat16"]
    whole = folder / "whole"
    done = run_python("train.py", *flags, "--out", whole)
    expect_success(done)

    killed = folder / "killed"
    command = [sys.executable, "train.py", *map(str, flags), "--out", str(killed)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (killed / "checkpoint.pt").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    n_done = read_lines(killed)[-1].get("step")
    expect_success(run_python("train.py", "--resume", killed))
    file = "adapter/adapter_model.safetensors"
    if (whole / file).read_bytes() != (killed / file).read_bytes():
        raise AssertionError("the adapter of the run that was killed differs")
    return {"steps": n_steps, "killed after step": n_done, "bits": "equal"}


def out_of_memory(place, folder):
    """A run that needs more memory than there is ends in one line, whose advice helps."""
    n_bytes = 5 * 10**7 if place.is_dry else 2 * 10**9
    n_rows = 2048 if place.is_dry else 100_000  # whose embeddings take a large part of the limit
    flags = ["--task", few_rows(folder), "--batch-size", n_rows]

    def run(name, *more):
        words = ["-c", LIMITED, place.device, n_bytes, folder / name, *flags, *more]
        return run_python(*words, timeout=300)

    failed = run("too large")
    message = failed.stderr.strip().splitlines()[-1] if failed.stderr else ""
    is_expected = failed.returncode == 1 and "out of memory: lower --micro-batch-size" in message
    if not is_expected or "Traceback" in failed.stderr:
        found = f"exit code {failed.returncode}: {failed.stderr[-500:]}"
        raise AssertionError(f"expected one line about memory, found {found}")
    helped = run("helped", "--micro-batch-size", 64)
    expect_success(helped)
    return {"limit": n_bytes, "message": message[:120], "--micro-batch-size 64": "trains"}


def all_cards(place, folder):
    """All devices of this machine together (NCCL on CUDA) train what one of them trains.

    Two processes also train on the CPU, although torch finds an accelerator.
    """
    figures = compare_losses(place, folder, {"several": all_devices(place)})
    words = [*processes(2), "--device", "cpu", "--task", folder / "few-rows", "--steps", 2]
    expect_success(run_python(*words, "--out", folder / "on the CPU", timeout=240))
    return figures | {"2 processes on the CPU": "train"}


def divided(place, folder):
    """A base that all devices divide, or that one keeps in the CPU's memory, trains as a whole."""
    ways = {"offloaded": ["train.py", "--offload", "--device", place.device]}
    if place.n_devices > 1:
        ways["divided"] = [*all_devices(place), "--shard"]
    return compare_losses(place, folder, ways)


def all_devices(place):
    """Return the words for Python that train on all devices of this machine."""
    return [*processes(place.n_devices), "--device", place.device.type]


def processes(n):
    """Return the words for Python that start train.py in several processes."""
    return ["-m", "torch.distributed.run", "--nproc-per-node", n, "train.py"]


def compare_losses(place, folder, ways):
    """Train a few steps in each way, and expect the losses of a plain run on one device.

    ways: name -> words for Python.
    """
    flags = ["--task", few_rows(folder), "--steps", 6, "--dtype", "float32"]
    flags += ["--dropout", 0, "--batch-size", 8]
    expect_success(
        run_python("train.py", *flags, "--device", place.device, "--out", folder / "one")
    )
    losses = losses_of(folder / "one")
    figures = {"processes": place.n_devices}
    for name, words in ways.items():
        start = time.perf_counter()
        expect_success(run_python(*words, *flags, "--out", folder / name, timeout=240))
        figures[f"{name}, seconds"] = time.perf_counter() - start
        found = losses_of(folder / name)
        difference = max(abs(a - b) for a, b in zip(losses, found, strict=True))
        if not difference <= 1e-4:
            raise AssertionError(f"losses of a plain run {losses}, {name} {found}")
        figures[f"{name}, losses differ by"] = difference
    return figures


def losses_of(folder):
    return [line["loss"] for line in read_lines(folder) if "loss" in line]


def expect_success(done):
    if done.returncode != 0:
        raise AssertionError(f"exit code {done.returncode}: {done.stderr[-500:]}")


def read_lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
