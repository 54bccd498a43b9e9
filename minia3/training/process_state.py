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

    The block itself begins with the settings of a fresh process, whatever a notebook has set.
    """
    dtype = torch.get_default_dtype()
    n_threads = torch.get_num_threads()
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    is_warning_only = torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.get(WORKSPACE)
    random = torch.get_rng_state()
    started = [module for module in accelerators() if module.is_initialized()]
    random_on_accelerators = [module.get_rng_state_all() for module in started]
    cards = [module.current_device() for module in started]
    autocast = [kind for kind in AUTOCAST_KINDS if is_autocast_on(kind)]
    torch.set_default_dtype(torch.float32)
    for kind in autocast:
        torch.set_autocast_enabled(kind, False)
    try:
        with torch.inference_mode(False), torch.enable_grad(), cpu_as_default():
            yield
    finally:
        torch.set_default_dtype(dtype)
        for kind in autocast:
            torch.set_autocast_enabled(kind, True)
        torch.set_num_threads(n_threads)
        if torch.are_deterministic_algorithms_enabled() != is_deterministic:
            # This imports torch's compiler, which takes a second.
            torch.use_deterministic_algorithms(is_deterministic, warn_only=is_warning_only)
        torch.set_rng_state(random)
        for module, states, card in zip(started, random_on_accelerators, cards, strict=True):
            module.set_rng_state_all(states)
            module.set_device(card)
        for module in accelerators():
            if module not in started:
                # The run has replaced the seed that an accelerator gets when it is first used.
                module.manual_seed_all(torch.initial_seed())
        if workspace is None:
            os.environ.pop(WORKSPACE, None)


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
