"""minia3: (IA)^3 inside a T5 and a LLaMA written directly in torch. The chapters begin in ia3.py.

Public names are imported on first use (PEP 562): `import minia3` does not import torch.
"""

import importlib

__version__ = "0.1.0"

_NAMES = {  # module -> its public names
    "model.ia3": "vectors freeze",
    "checkpoints.load": "load_model",
    "checkpoints.save": "save_model",
    "checkpoints.tokenizer": "load_tokenizer",
    "adapters.rows": "load_adapter save_adapter",
    "adapters.named_rows": "Adapters",
    "adapters.merge": "merge",
    "tasks.splits": "load_task",
    "inference.scoring": "logprobs rank",
    "inference.decoding": "generate stream",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = list(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'minia3' has no attribute {name!r}")
    return getattr(importlib.import_module(f"minia3.{_HOMES[name]}"), name)


def __dir__():
    return sorted([*globals(), *_HOMES])
