"""A mode of torch that sees each operator, and in which some functions are replaced."""

import contextlib
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode


class PatchedMode(TorchDispatchMode):
    """While this is active, `replaced_functions` are in place of others."""

    def __init__(self):
        super().__init__()
        self.patches = contextlib.ExitStack()

    def replaced_functions(self):
        """Return (owner, name, function) of each function that takes the place of another."""
        return ()

    def __enter__(self):
        for owner, name, function in self.replaced_functions():
            self.patches.enter_context(mock.patch.object(owner, name, function))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.patches.close()
