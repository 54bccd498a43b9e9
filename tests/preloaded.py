"""What the server of running.py imports, so that the processes that it forks need not.

Such a process imports the module of the function that it calls, and so pytest and conftest.py. Some
also import bitsandbytes, which takes longer than all that they do. Nothing here may import
huggingface_hub, because it reads the environment when it is imported, and tests change it.
"""

import atexit
import contextlib
import gc

import conftest  # noqa: F401
import several  # noqa: F401

from minia3.model.quantized import bitsandbytes_functions

with contextlib.suppress(ValueError):  # it is not installed
    bitsandbytes_functions()

# A collection in a forked process would look at all this again, and so copy it.
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)  # or triton would list on stderr that it was not freed
