"""Settings of the numerical libraries that stand for other processors: each gives other bits than the others."""

import os

import pytest

from fedsim.core.numerics import lacking


ELSEWHERE = {name: value for name, value in os.environ.items() if name != "FEDSIM_NUMERICS"} | {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "SSE4_2",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "DNNL_MAX_CPU_ISA": "SSE41",
    "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
}

needs_avx2 = pytest.mark.skipif(bool(lacking()), reason=f"portable numerics: this processor has no {lacking()}")
