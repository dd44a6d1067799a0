"""The vectors that all kernels are written with, per instruction set: tails, rounding to bfloat16, exp and tanh."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from tandem.ops.cpu import build, library

WIDTHS = {"amx": 16, "avx512": 16, "avx2": 8}
SOURCE = """
#include "vector.h"
using namespace tandem;
template <class From, class To, class F> void map(const From* x, To* y, int64_t n, F f) {
    for (int64_t i = 0; i < n; i += Vec::width) {
        const int64_t left = n - i;
        if (left >= Vec::width) store(y + i, f(load(x + i)));
        else store(y + i, f(load(x + i, left)), left);
    }
}
TANDEM_EXPORT void tandem_exp(const float* x, float* y, int64_t n) { map(x, y, n, [](Vec v) { return exp(v); }); }
TANDEM_EXPORT void tandem_tanh(const float* x, float* y, int64_t n) { map(x, y, n, [](Vec v) { return tanh(v); }); }
TANDEM_EXPORT void tandem_sigmoid(const float* x, float* y, int64_t n) {
    map(x, y, n, [](Vec v) { return sigmoid(v); });
}
TANDEM_EXPORT void tandem_narrow(const float* x, bf16* y, int64_t n) { map(x, y, n, [](Vec v) { return v; }); }
TANDEM_EXPORT void tandem_widen(const bf16* x, float* y, int64_t n) { map(x, y, n, [](Vec v) { return v; }); }
TANDEM_EXPORT void tandem_reduce(const float* x, float* y, int64_t n) {
    y[0] = sum(load(x, n));
    y[1] = largest(select(first_lanes(n), load(x, n), set(-1e30f)));
}
TANDEM_EXPORT void tandem_scalar_narrow(const float* x, bf16* y, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] = to_bf16(x[i]);
}
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    if build._compiler() is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("vector")
    (folder / "csrc").mkdir()
    for name in ("common.h", "vector.h"):
        shutil.copy(build.SOURCES / name, folder / "csrc")
    (folder / "csrc" / "probe.cpp").write_text(SOURCE)
    outcome = build.build(folder / "lib", folder / "obj", folder / "csrc")
    assert not outcome.failed, outcome.notes
    return folder / "lib"


@pytest.fixture(params=["amx", "avx512", "avx2"])
def lib(request, built):
    if request.param not in build.cpu_isas() or not (built / f"kernels_{request.param}.so").exists():
        pytest.skip(f"{request.param} does not run here")
    return library.open_library(request.param, built)


def call(lib, name: str, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    y = torch.full((len(x) + 32,), float("nan"), dtype=dtype)
    lib.bind(name, "ppl")(x.data_ptr(), y.data_ptr(), len(x))
    assert y[len(x) :].isnan().all(), "wrote beyond the end"
    return y[: len(x)]


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected) / expected).abs().max().item()


def test_exp(lib) -> None:
    x = torch.cat((torch.linspace(-87.3, 88.7, 200_001), torch.linspace(-1e-3, 1e-3, 1001)))
    assert relative(call(lib, "tandem_exp", x), x.double().exp()) < 2e-7
    x = torch.tensor([float("-inf"), -1e9, -104.5, -95.0, 0.0, 88.8, 1e9, float("inf"), float("nan")])
    torch.testing.assert_close(call(lib, "tandem_exp", x), x.exp(), rtol=1e-3, atol=1e-45, equal_nan=True)
    assert call(lib, "tandem_exp", x)[0] == 0 and call(lib, "tandem_exp", x)[4] == 1


def test_tanh_and_sigmoid(lib) -> None:
    magnitudes = torch.logspace(-30, 2, 50_001)
    x = torch.cat((magnitudes, -magnitudes, torch.linspace(-2, 2, 100_001)[:50_000]))
    assert relative(call(lib, "tandem_tanh", x), x.double().tanh()) < 4e-7
    assert relative(call(lib, "tandem_sigmoid", x[x > -80].contiguous()), x[x > -80].double().sigmoid()) < 4e-7
    x = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), -200.0])
    torch.testing.assert_close(call(lib, "tandem_tanh", x), x.tanh(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(call(lib, "tandem_sigmoid", x), x.sigmoid(), rtol=0, atol=1e-44, equal_nan=True)


@pytest.mark.parametrize("name", ["tandem_narrow", "tandem_scalar_narrow"])
def test_narrowing_rounds_as_torch_does(lib, name) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).to(torch.int32)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 3.4e38, 1.00390625, 1.01171875, -0.0])
    x = torch.cat((bits.view(torch.float32), special))
    x = x[~((x != 0) & (x.abs() < 2e-38))]  # subnormal: the vector instruction makes them 0
    found, expected = call(lib, name, x, torch.bfloat16), x.bfloat16()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_widening_and_tails(lib) -> None:
    for n in range(36):
        x = torch.randn(n, dtype=torch.bfloat16)
        assert torch.equal(call(lib, "tandem_widen", x), x.float())
        assert torch.equal(call(lib, "tandem_narrow", x.float(), torch.bfloat16), x)


def test_reductions(lib) -> None:
    for n in range(1, WIDTHS[lib.isa] + 1):
        x = torch.cat((-torch.arange(1.0, n + 1), torch.full((32,), 1e9)))
        y = torch.zeros(2)
        lib.bind("tandem_reduce", "ppl")(x.data_ptr(), y.data_ptr(), n)
        assert y.tolist() == [-n * (n + 1) / 2, -1.0]
