"""A package that minia3 can do without, for tests that cannot."""

import pytest

from minia3.model.quantized import bitsandbytes_functions


def require_bitsandbytes():
    """Return bitsandbytes.functional, or skip the test (or the module) if it is not installed.

    It is imported as minia3 imports it. `pytest.importorskip` would ask the hub for kernels.
    """
    try:
        return bitsandbytes_functions()
    except ValueError as error:
        pytest.skip(str(error), allow_module_level=True)
