"""Conformance checks for plugs: run them in the tests of a package that brings its own methods or configs.

    from sd_mecha.testing import check_merge_method

    def test_my_method():
        check_merge_method(my_method, examples=[{"alpha": 0.3}, {"alpha": 1.0}])

They need no test framework. A check that fails raises `ContractError`, an AssertionError, which says what was
promised, for which input it does not hold, and what differed.
"""

from __future__ import annotations

from sd_mecha.testing.config_checks import check_model_config as check_model_config
from sd_mecha.testing.method_checks import check_merge_method as check_merge_method

__all__ = ["check_merge_method", "check_model_config"]
