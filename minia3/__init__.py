"""minia3: (IA)^3 inside a T5 and a LLaMA written directly in torch. The chapters begin in ia3.py.

Public names are imported on first use (PEP 562): `import minia3` does not import torch.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "load_model": "load",
    "save_model": "load",
    "load_tokenizer": "tokenizer",
    "load_task": "data",
    "load_adapter": "adapters",
    "save_adapter": "adapters",
    "Adapters": "adapters",
    "merge": "merging",
    "vectors": "ia3",
    "freeze": "ia3",
    "logprobs": "generation",
    "generate": "generation",
    "stream": "generation",
    "rank": "generation",
}

__all__ = list(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'minia3' has no attribute {name!r}")
    return getattr(importlib.import_module(f"minia3.{_HOMES[name]}"), name)


def __dir__():
    return sorted([*globals(), *_HOMES])
