"""minia3: (IA)^3 inside a T5 and a LLaMA written directly in torch. The chapters begin in ia3.py.

Public names are imported on first use (PEP 562): `import minia3` does not import torch.
"""

import importlib

__version__ = "0.1.0"

_NAMES = {  # module -> what is public of it
    "ia3": "vectors freeze",
    "load": "load_model save_model",
    "tokenizer": "load_tokenizer",
    "adapters": "load_adapter save_adapter Adapters",
    "merging": "merge",
    "data": "load_task",
    "generation": "logprobs generate stream rank",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = list(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'minia3' has no attribute {name!r}")
    return getattr(importlib.import_module(f"minia3.{_HOMES[name]}"), name)


def __dir__():
    return sorted([*globals(), *_HOMES])
