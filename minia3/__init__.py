"""minia3: (IA)^3 inside a T5 and a LLaMA that are written directly in torch.

Start reading at minia3/model/ia3.py, or at train.py beside this folder. Public names are imported
when they are first used (PEP 562), so `import minia3` does not import torch.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.2.0.dev0"

_MODULES = {  # public name: its module
    "train": "minia3.training.from_python",
    "batches": "minia3.training.own_loop",
    "prompts_for": "minia3.training.own_loop",
    "choice_logprobs": "minia3.inference.scoring",
    "total_loss": "minia3.training.losses",
    "Adafactor": "minia3.training.optimizer",
    "evaluate": "minia3.inference.evaluation",
    "load_model": "minia3.checkpoints.load",
    "load_tokenizer": "minia3.checkpoints.tokenizer",
    "save_model": "minia3.checkpoints.save",
    "load_task": "minia3.tasks.splits",
    "vectors": "minia3.model.ia3",
    "freeze": "minia3.model.ia3",
    "move_to_huge_pages": "minia3.model.huge_pages",
    "load_adapter": "minia3.adapters.rows",
    "save_adapter": "minia3.adapters.rows",
    "Adapters": "minia3.adapters.named_rows",
    "merge": "minia3.adapters.merge",
    "logprobs": "minia3.inference.scoring",
    "rank": "minia3.inference.scoring",
    "generate": "minia3.inference.decoding",
    "stream": "minia3.inference.decoding",
}
__all__ = list(_MODULES)

# Editors and type checkers do not run `__getattr__`: these lines tell them the same.
if TYPE_CHECKING:
    from minia3.adapters.merge import merge as merge
    from minia3.adapters.named_rows import Adapters as Adapters
    from minia3.adapters.rows import load_adapter as load_adapter
    from minia3.adapters.rows import save_adapter as save_adapter
    from minia3.checkpoints.load import load_model as load_model
    from minia3.checkpoints.save import save_model as save_model
    from minia3.checkpoints.tokenizer import load_tokenizer as load_tokenizer
    from minia3.inference.decoding import generate as generate
    from minia3.inference.decoding import stream as stream
    from minia3.inference.evaluation import evaluate as evaluate
    from minia3.inference.scoring import choice_logprobs as choice_logprobs
    from minia3.inference.scoring import logprobs as logprobs
    from minia3.inference.scoring import rank as rank
    from minia3.model.huge_pages import move_to_huge_pages as move_to_huge_pages
    from minia3.model.ia3 import freeze as freeze
    from minia3.model.ia3 import vectors as vectors
    from minia3.tasks.splits import load_task as load_task
    from minia3.training.from_python import train as train
    from minia3.training.losses import total_loss as total_loss
    from minia3.training.optimizer import Adafactor as Adafactor
    from minia3.training.own_loop import batches as batches
    from minia3.training.own_loop import prompts_for as prompts_for


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module 'minia3' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__():
    return sorted([*globals(), *_MODULES])
