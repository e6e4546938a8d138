"""Fixtures that several test folders share. Eight host devices, so that sharding is tested on any machine."""

import itertools
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping

_FLAG = "--xla_force_host_platform_device_count"
# Nearly all of the suite's time is XLA's: emitting loops by the older way and on one thread takes a third of it. An XLA
# that lacks an option ends the process that names it, so another one is asked first.
_QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
_flags = os.environ.get("XLA_FLAGS", "")
if _FLAG not in _flags:  # read once, when jax makes its first array; worker processes inherit it
    _flags = f"{_flags} {_FLAG}=8".strip()
    _ask = [sys.executable, "-c", "import jax; jax.devices()"]
    if not subprocess.run(_ask, env=os.environ | {"XLA_FLAGS": _QUICK}, capture_output=True, check=False).returncode:
        _flags = f"{_flags} {_QUICK}"
    os.environ["XLA_FLAGS"] = _flags

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

_finished = itertools.count(1)


@pytest.hookimpl(tryfirst=True)  # before the fixtures of the test's module
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Most tests run each program once, on tiny arrays: what they cost is its compilation. Those about what a compiled
    program is, or that compare with another process bit for bit, are marked ``optimized``."""
    name, quickly = "jax_disable_most_optimizations", item.get_closest_marker("optimized") is None
    if jax.config.read(name) != quickly:
        jax.config.update(name, quickly)
        jax.clear_caches()  # which do not know of the option: a program of another test would be used as it is


@pytest.fixture(autouse=True)
def few_programs() -> Iterator[None]:
    """Drops compiled programs now and then: each holds memory maps, of which Linux gives a process 65,530."""
    yield
    if next(_finished) % 100 == 0:
        jax.clear_caches()


_SHARED = pathlib.Path(__file__).parents[2] / "shared"


def _directory(variable: str, default: pathlib.Path) -> pathlib.Path:
    path = pathlib.Path(os.environ.get(variable, default))
    if not path.is_dir():
        pytest.skip(f"no directory {path}: set {variable} to run this test")
    return path


@pytest.fixture(scope="session")
def oracles() -> pathlib.Path:
    """Recorded numbers of independent implementations."""
    return _directory("JLORA_ORACLES", _SHARED / "oracles")


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Data sets and weights that are not part of the repository."""
    return _directory("JLORA_DATA", _SHARED / "data")


@pytest.fixture(scope="session")
def recorded_inputs() -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """From inputs recorded with PyTorch, by their names there, to the keyword arguments of the modules of train."""
    names = {"input_ids": "ids", "attention_mask": "segment_ids", "token_type_ids": "token_type_ids"}

    def convert(recorded):
        inputs = {names[name]: recorded[name].astype(np.int32) for name in names if name in recorded}
        if "pixel_values" in recorded:
            inputs["pixels"] = np.moveaxis(recorded["pixel_values"], 1, -1)
        return inputs

    return convert


@pytest.fixture(scope="session")
def same_logits() -> Callable[..., None]:
    """Compares logits with recorded ones, by the token where the text is not padding or by the row."""

    def compare(got, wanted, recorded, atol=1e-4, err_msg=""):
        real = recorded["attention_mask"] == 1 if wanted.ndim == 3 and "attention_mask" in recorded else ...
        assert got.dtype == np.float32 and got.shape == wanted.shape
        np.testing.assert_allclose(np.asarray(got)[real], wanted[real], atol=atol, rtol=0, err_msg=err_msg)

    return compare


@pytest.fixture
def x64() -> Iterator[None]:
    """64-bit types for one test; ``pytestmark = pytest.mark.usefixtures("x64")`` for a file."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def devices() -> list:
    """Eight devices, or a skip where the platform has fewer."""
    if len(jax.devices()) < 8:
        pytest.skip(f"{len(jax.devices())} devices; run on the CPU with {_FLAG}=8")
    return jax.devices()[:8]
