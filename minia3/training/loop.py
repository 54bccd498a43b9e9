"""Load train.py as a module, so that the package need not have a second copy of its loop."""

import importlib.util
import sys

from minia3.files.shipped import find_shipped

NAME = "minia3.train_script"


def load_loop():
    """Return train.py as a module, which is loaded once.

    Its name is not `train`, because a user's own script may be called train.py.
    """
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(NAME, find_shipped("train.py"))
        module = importlib.util.module_from_spec(spec)
        sys.modules[NAME] = module
        spec.loader.exec_module(module)
    return sys.modules[NAME]
