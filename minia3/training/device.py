"""Where a model runs: the device, the dtype of its weights, and the memory that it took."""

import os
import re
import sys
from contextlib import suppress
from pathlib import Path

import torch

from minia3.files.processes import gathered, local_rank, n_on_machine

DEVICES = {  # kind -> what it is; by default, a run takes the first one that the machine has
    "cuda": "NVIDIA's or AMD's GPU",
    "mps": "Apple's GPU",
    "xpu": "Intel's GPU",
    "cpu": "no GPU found",
}

# Linux's control groups, which limit a container or a job of a cluster: in which of them this
# process is, and the folder that has a folder for each.
GROUPS_OF_PROCESS = Path("/proc/self/cgroup")
CONTROL_GROUPS = Path("/sys/fs/cgroup")

LONGEST_REASON = 75  # characters: torch lists all of its devices, or refers to a web page

# With fewer parameters than this, sharing an operation among cores takes longer than the operation.
SMALL_MODEL = 10**7


def choose_device(name):
    """Return the device, and why it was chosen. Raise ValueError if there is no such device.

    Several processes on a machine take one accelerator each.
    """
    if name is None:
        device, reason = best_device()
        return torch.device(device_of_process(device.type)), reason
    name = device_of_process(name)
    try:
        torch.ones(1, device=name).tolist()
    # torch raises NotImplementedError, AssertionError and others for devices that it lacks.
    except Exception as error:
        expected = f"expected a device that this machine has: {', '.join(available_devices())}"
        reason, *_ = re.split(r"\n|\. ", str(error))  # advice for programmers follows
        if len(reason) > LONGEST_REASON:
            reason = f"PyTorch {torch.__version__} finds no such device"
        raise ValueError(f"--device is {name!r}, {expected} ({reason})") from None
    return torch.device(name), "as asked"


def device_of_process(name):
    """Return the device of this process: of several accelerators, the one with its number.

    Raise ValueError if all processes would share a device, or if there are too few.
    """
    kind, _, index = name.partition(":")
    module = getattr(torch, kind, None)
    if n_on_machine() == 1 or kind == "cpu" or not hasattr(module, "device_count"):
        return name
    if index:
        raise ValueError(
            f"--device is {name!r}, but this machine has {n_on_machine()} processes of this run: "
            f"expected {kind!r}, which gives each of them its own"
        )
    n_devices = module.device_count()
    if local_rank() >= n_devices:
        raise ValueError(
            f"torchrun has started {n_on_machine()} processes on this machine, expected one for "
            f"each device of the kind {kind}, and there {are_devices(n_devices)}: give "
            f"--nproc-per-node {max(1, n_devices)}, or --device cpu"
        )
    if hasattr(module, "set_device"):
        module.set_device(local_rank())  # through which NCCL communicates
    return f"{kind}:{local_rank()}"


def are_devices(n):
    return "is 1" if n == 1 else f"are {n}"


def best_device():
    """Return the first of DEVICES that this machine has, and what to say about it."""
    kind = available_devices()[0]
    device = torch.device(kind)
    module = device_module(device)
    if hasattr(module, "get_device_name"):
        return device, module.get_device_name()
    return device, DEVICES.get(kind, "PyTorch's accelerator")


def device_module(device):
    """Return torch's module for an accelerator, such as torch.cuda. None: the CPU, or it has none.

    (torch.accelerator, which serves all of them, has too few functions before torch 2.9.)
    """
    return None if device.type == "cpu" else getattr(torch, device.type, None)


def available_devices():
    """Return the names of the kinds of devices that torch can use here, the fastest first."""
    kinds = [kind for kind in DEVICES if is_available(kind)]
    # From torch 2.6 on, torch itself knows the accelerator, also one that is not in our table.
    if hasattr(torch, "accelerator") and torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        if kind not in kinds:
            kinds.insert(0, kind)
    return kinds


def is_available(kind):
    if kind == "cpu":
        return True
    # In torch 2.5, a module such as torch.xpu may be absent.
    module = getattr(torch, kind, None)
    return module is not None and module.is_available()


def free_memory(device):
    """Return the bytes that are free on a device, or None if that is not known."""
    if device.type == "cpu":
        return free_memory_of_system()
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    module = device_module(device)
    if not hasattr(module, "mem_get_info"):
        return None
    # What torch keeps for later is free for us, too.
    cached = module.memory_reserved(device) - module.memory_allocated(device)
    return module.mem_get_info(device)[0] + cached


def free_memory_of_system():
    """Return the bytes that this process can still take: of the machine, and of its control groups.

    Several processes of a run get equal parts. Return None on systems other than Linux.
    """
    limits = []
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text("utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(1024 * int(line.split()[1]))
    with suppress(OSError, ValueError):
        for line in GROUPS_OF_PROCESS.read_text("utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            limits += free_in_groups(controllers, path)
    return max(0, min(limits)) // n_on_machine() if limits else None


def free_in_groups(controllers, path):
    """Return the bytes that are free in a control group and in those around it: one per limit.

    controllers, path: from a line of /proc/self/cgroup. A container may name its group as the
    machine does, and see only the outermost folder, which is then its own.
    """
    root = CONTROL_GROUPS
    files = ("memory.max", "memory.current")
    if "memory" in controllers.split(","):  # version 1; version 2 names no controllers
        root = CONTROL_GROUPS / "memory"
        files = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    limit, used = files
    folder = root / path.lstrip("/")
    found = []
    for group in (folder, *folder.parents):
        with suppress(OSError, ValueError):  # the file says "max" if there is no limit
            n_used = int((group / used).read_text()) - cached_files(group / "memory.stat")
            found.append(int((group / limit).read_text()) - n_used)
    return found


def cached_files(path):
    """Return the bytes of files that a group keeps in memory until a process needs the memory.

    After a download they may fill the group up to its limit. MemAvailable counts them as free, too.
    path: of memory.stat. Raise OSError or ValueError if it cannot be read.
    """
    sizes = {}
    for line in path.read_text("utf-8").splitlines():
        name, n_bytes = line.split()
        sizes[name] = int(n_bytes)
    # In version 1, the totals have the groups below, too, as what is used has.
    prefix = "total_" if "total_active_file" in sizes else ""
    return sizes.get(f"{prefix}active_file", 0) + sizes.get(f"{prefix}inactive_file", 0)


def choose_dtype(config, device):
    """Return the dtype of the weights.

    The vectors are float32 whatever the dtype of the base is. T-Few's code keeps the base in
    float32, too, and computes products of matrices in bfloat16 (autocast).
    """
    if config.dtype is not None:
        return getattr(torch, config.dtype)
    # Full fine-tuning updates the weights themselves, and in bfloat16 small updates are lost.
    if device.type == "cpu" or config.method == "full" or not has_bfloat16(device):
        return torch.float32
    return torch.bfloat16


def has_bfloat16(device):
    """Return whether a GPU computes in bfloat16 itself: NVIDIA's do from capability 8.0 on.

    Otherwise PyTorch converts to float32 in each product, which is slower than float32, and does
    not fuse attention (T4, V100), or there is no product in bfloat16 at all (P100).
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def check_same_device(device, dtype):
    """Raise ValueError unless all processes of a run compute alike.

    A machine whose GPU does not work would choose its CPU, and the sums of its gradients would wait
    there for those of the GPUs, forever. All processes must call this, and all of them raise it.
    """
    ways = gathered(f"on {device.type} in {str(dtype).removeprefix('torch.')}")
    for number, way in enumerate(ways):
        if way != ways[0]:
            found = f"process {number} computes {way}, and the first one {ways[0]}"
            raise ValueError(f"{found}: give --device and --dtype")


def use_deterministic_kernels():
    """Make equal runs give equal bits on a GPU, too."""
    torch.use_deterministic_algorithms(True)
    # torch refuses cuBLAS without this, because cuBLAS is not deterministic otherwise.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def limit_threads(n_parameters):
    """Use a single thread for a small model."""
    if n_parameters < SMALL_MODEL:
        torch.set_num_threads(1)


def peak_memory(device):
    """Return the peak memory in bytes: what torch held on an accelerator, or the process took.

    Return 0 if the system does not say. Apple's GPU reports no peak, so this is what it holds now.
    """
    module = device_module(device)
    if hasattr(module, "max_memory_allocated"):
        return module.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    with suppress(ImportError):  # Windows does not have this module
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, others KiB
    return 0
