"""What a run changes for the whole process, and how it is put back."""

import os
from contextlib import contextmanager

import torch

from minia3.model.to_device import cpu_as_default

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
AUTOCAST_KINDS = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def unchanged_process():
    """Put back the settings of torch and its random numbers at the end of the block.

    The block itself begins with the settings of a fresh process, whatever a notebook has set, apart
    from the number of threads, which is the user's.
    """
    dtype = torch.get_default_dtype()
    n_threads = torch.get_num_threads()
    determinism = torch.get_deterministic_debug_mode()
    workspace = os.environ.get(WORKSPACE)
    random = torch.get_rng_state()
    # Apple's GPU is apart, because `torch.manual_seed` reaches it even if nothing has used it.
    random_on_mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    started = [module for module in accelerators() if module.is_initialized()]
    random_on_accelerators = [module.get_rng_state_all() for module in started]
    cards = [module.current_device() for module in started]
    autocast = [kind for kind in AUTOCAST_KINDS if is_autocast_on(kind)]
    torch.set_default_dtype(torch.float32)
    set_determinism(0)
    for kind in autocast:
        torch.set_autocast_enabled(kind, False)
    try:
        with true_float32(), torch.inference_mode(False), torch.enable_grad(), cpu_as_default():
            yield
    finally:
        torch.set_default_dtype(dtype)
        for kind in autocast:
            torch.set_autocast_enabled(kind, True)
        torch.set_num_threads(n_threads)
        set_determinism(determinism)
        torch.set_rng_state(random)
        if random_on_mps is not None:
            torch.mps.set_rng_state(random_on_mps)
        for module, states, card in zip(started, random_on_accelerators, cards, strict=True):
            module.set_rng_state_all(states)
            module.set_device(card)
        for module in accelerators():
            if module not in started:
                # The run has replaced the seed that an accelerator gets when it is first used.
                module.manual_seed_all(torch.initial_seed())
        if workspace is None:
            os.environ.pop(WORKSPACE, None)


def set_determinism(mode):
    """Demand deterministic algorithms: 0 for not at all, 1 with a warning, 2 with an error."""
    if torch.get_deterministic_debug_mode() != mode:
        # This imports torch's compiler, which takes a second.
        torch.use_deterministic_algorithms(mode > 0, warn_only=mode == 1)


@contextmanager
def true_float32():
    """Within the block, multiply matrices of float32 in float32, not in TF32 or bfloat16.

    A notebook may have asked for less, or the variable TORCH_ALLOW_TF32_CUBLAS_OVERRIDE.
    """
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set as torch 2.9 does, so that the older way cannot tell
        precision = None
    if precision == "highest":
        yield
        return
    kinds = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    kinds = [kind for kind in kinds if hasattr(kind, "fp32_precision")]  # torch 2.9
    before = [kind.fp32_precision for kind in kinds]
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        for kind, value in zip(kinds, before, strict=True):
            kind.fp32_precision = value


def is_autocast_on(kind):
    # Older releases of torch raise an error if autocast does not know the kind of device.
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def accelerators():
    """Return a list of torch.cuda and torch.xpu, without a module that this torch lacks.

    Asking one that is not initialized for its random numbers would start it, which takes a second
    and memory.
    """
    modules = [getattr(torch, kind, None) for kind in ("cuda", "xpu")]
    return [module for module in modules if module is not None]
