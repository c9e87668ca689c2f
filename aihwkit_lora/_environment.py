"""Guard against an aihwkit and a torch whose compiled parts disagree, and a report of what works.

Importing a mismatched pair succeeds, and so does everything that aihwkit does in pure torch; only
a tile of its C++ simulator fails, late and with a message about tensor dimensions (aihwkit 1.1.0
with torch 2.13 or newer). So the guard builds such a tile and runs it.
"""

from __future__ import annotations

import functools
import importlib
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from aihwkit_lora.errors import EnvironmentMismatchError

_KNOWN_PAIR = "'aihwkit==1.2.0' 'torch==2.15.0'"
_VERSIONS = {
    "aihwkit": True,
    "torch": True,
    "peft": True,
    "pytorch-lightning": True,
    "torchmetrics": True,
    "transformers": False,
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """What one look at the environment found.

    Args:
        name: What was looked at.
        ok: Whether it works.
        detail: A version, or the reason why it does not work, in one line.
        required: Whether this package needs it.

    Example:
        >>> Check(name="CUDA", ok=False, detail="no device", required=False).fatal
        False
    """

    name: str
    ok: bool
    detail: str
    required: bool

    @property
    def fatal(self) -> bool:
        """Whether this package cannot do its work because of what was found."""
        return self.required and not self.ok


@functools.cache
def check() -> None:
    """Run a small pulsed layer, so that a wrong installation stops at import; once a process.

    ``aihwkit-lora doctor`` passes without a look: it is there to explain what this would raise.

    Raises:
        EnvironmentMismatchError: The compiled parts of aihwkit and torch disagree.

    Example:
        >>> check()
    """
    if _doctor_is_running():
        return
    try:
        probe_pulsed_tile()
    except ModuleNotFoundError:
        raise
    except (ImportError, RuntimeError, TypeError) as error:
        raise EnvironmentMismatchError(
            f"aihwkit {_version('aihwkit')} cannot work with torch {_version('torch')}: a pulsed "
            f"layer of size 2×2 failed with '{_first_line(error)}'. Their compiled parts disagree. "
            f"Install a pair that agrees, for example: pip install {_KNOWN_PAIR}"
        ) from error


def doctor() -> list[Check]:
    """Look at everything this package builds on.

    Returns:
        One entry for each version, engine and library. Never raises: what fails is an entry.

    Example:
        >>> [check.name for check in doctor() if check.fatal]
        []
    """
    python = Check(name="Python", ok=True, detail=platform.python_version(), required=True)
    versions = [_installed(name, required) for name, required in _VERSIONS.items()]
    return [
        python,
        *versions,
        _attempt("RPUCuda tiles", probe_pulsed_tile),
        _attempt("torch tiles", _probe_torch_tile),
        _attempt("PEFT attaches", _probe_peft),
        _attempt("Lightning imports", lambda: _import("pytorch_lightning")),
        _attempt("CUDA", _probe_cuda, required=False),
        _attempt("torchvision", lambda: _import("torchvision"), required=False),
    ]


def probe_pulsed_tile() -> str:
    """Build and run a tile of aihwkit's C++ simulator; raise whatever that raises.

    The state of torch's random numbers, its default type and its default device do not matter
    and do not change.

    Returns:
        What worked, in words.
    """
    from aihwkit.simulator.configs import SingleRPUConfig

    return _run_layer(SingleRPUConfig())


def _probe_torch_tile() -> str:
    from aihwkit.simulator.configs import TorchInferenceRPUConfig

    return _run_layer(TorchInferenceRPUConfig())


def _run_layer(rpu_config: object) -> str:
    import torch
    from aihwkit.nn import AnalogLinear

    # A user's default device or dtype must not make a sound installation look broken, and an
    # import must not move the random numbers of a seeded script.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
        layer = AnalogLinear(2, 2, bias=False, rpu_config=rpu_config)
        layer(torch.ones(1, 2, dtype=torch.float32))
    return "a layer runs"


def _probe_peft() -> str:
    from peft import LoraConfig, get_peft_model
    from torch import device, nn, random

    with device("cpu"), random.fork_rng(devices=[]):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(r=1, target_modules=["0"]))
    return "LoRA on a linear layer"


def _probe_cuda() -> str:
    import torch
    from aihwkit.simulator.rpu_base import cuda

    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device; everything runs on the CPU")
    tiles = "C++ and torch tiles" if cuda.is_compiled() else "torch tiles only"
    return f"{torch.cuda.get_device_name()}, {tiles}"


def _import(name: str) -> str:
    importlib.import_module(name)
    return "imports"


def _attempt(name: str, probe: Callable[[], str], *, required: bool = True) -> Check:
    # Whatever a broken library raises is the finding; none may stop the rest of the report.
    try:
        return Check(name=name, ok=True, detail=probe(), required=required)
    except Exception as error:
        return Check(name=name, ok=False, detail=_first_line(error), required=required)


def _installed(name: str, required: bool) -> Check:
    version = _version(name)
    return Check(name=name, ok=version != "not installed", detail=version, required=required)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _doctor_is_running() -> bool:
    # Importing the command line imports this package first, which would end the doctor before it
    # starts. While `python -m` imports the parents of a module, argv[0] is "-m".
    return sys.argv[1:2] == ["doctor"] and Path(sys.argv[0]).stem in {"aihwkit-lora", "-m"}
