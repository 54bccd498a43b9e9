"""What a run was measured on: the machine, the packages, the code, and who else was busy there."""

import contextlib
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from minia3.model.quantized import bitsandbytes_functions
from minia3.training.device import device_module

ROOT = Path(__file__).resolve().parents[2]
# Instructions that change what a matrix product costs, as Linux names them, of x86 and of ARM.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


def describe_machine(device):
    """Return what the JSON says about the machine, as a dict."""
    described = {
        "processor": processor_name(),
        "instructions": [name for name in INSTRUCTIONS if name in processor_flags()],
        "cores": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        # Without the distributor's suffix.
        "kernel": f"{platform.system()} {platform.release().partition('-')[0]}",
    }
    module = device_module(torch.device(device))
    if module is not None:
        described["accelerator"] = module.get_device_name(device)
    return described


def processor_name():
    """Return the processor's name, such as "AMD EPYC, family 26, model 2".

    In a virtual machine, the name alone may stand for several generations.
    """
    name = cpuinfo("model name") or platform.processor() or platform.machine()
    family = cpuinfo("cpu family")  # x86 has one
    return name if family is None else f"{name}, family {family}, model {cpuinfo('model')}"


def processor_flags():
    flags = cpuinfo("flags") or cpuinfo("Features") or ""
    return flags.split()


def cpuinfo(key):
    """Return what Linux says about the first processor under a key, or None."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return None
    found = re.search(rf"^{key}\s*: (.*)$", path.read_text(), re.MULTILINE)
    return None if found is None else found[1]


def load_average():
    """Return the mean number of processes that wanted a core in the last minute."""
    return os.getloadavg()[0]


def n_others_busy():
    """Return how many threads of other processes want a core now, or None if not on Linux."""
    path = Path("/proc/loadavg")
    if not path.exists():
        return None
    n_busy = int(path.read_text().split()[3].partition("/")[0])
    return max(n_busy - n_own_busy(), 0)  # both may change while they are read


def n_own_busy():
    """Return how many threads of this process want a core, including the one that asks."""
    n_busy = 0
    for stat in Path("/proc/self/task").glob("*/stat"):
        state = stat.read_text().rpartition(")")[2].split()[0]
        n_busy += state == "R"
    return n_busy


def versions():
    """Return the versions of what is compared. transformers stays quiet from here on."""
    with contextlib.suppress(ValueError):  # it may be missing
        bitsandbytes_functions()  # PEFT would import it in a way that asks the hub for kernels
    import peft
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return {module.__name__: module.__version__ for module in (torch, transformers, peft)}


def commit():
    """Return the commit of the code, and whether files of the code differ from it."""
    found = git("rev-parse", "HEAD")
    if found is None:
        return "unknown"
    changed = git("status", "--porcelain", "--", "minia3", "train.py", "tests/benchmarks/*.py")
    return f"{found}, changed" if changed else found


def git(*words):
    """Return what git prints, or None if there is no git or no repository."""
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return None if done.returncode else done.stdout.strip()
