"""What tests of the compiled kernels share: the library of each instruction set that this machine has."""

import pytest

from tandem.ops.cpu import library


@pytest.fixture(scope="module", params=["amx", "avx512", "avx2"])
def compiled(request: pytest.FixtureRequest) -> library.Library:
    usable, reasons = library.available()
    if request.param not in usable:
        pytest.skip(f"{request.param}: {reasons[request.param]}")
    loaded = library.load(request.param)
    assert loaded is not None and loaded.isa == request.param
    return loaded
