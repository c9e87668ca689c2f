"""Try a PEFT method on a frozen model and say what happened, without an opinion beforehand.

Every statement of the coverage table comes from here: attach the method, train it a few steps,
look who computed with what, save, load into an equal chip, try to merge.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import torch
from aihwkit.nn.conversion import convert_to_analog
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import aihwkit_lora as al
from aihwkit_lora.tiles.readonly import count_weight_reads

_SEED = 5
_STEPS = 3
_MERGES: tuple[tuple[str, dict[str, bool]], ...] = (
    ("merge_adapter", {}),
    ("merge_adapter", {"safe_merge": True}),
    ("merge_and_unload", {}),
    ("merge_and_unload", {"safe_merge": True}),
)


class Verdict(StrEnum):
    """How a method of PEFT gets on with frozen arrays."""

    YES = "yes"
    """The arrays are read in every forward; the adapter computes beside them."""
    READS_WEIGHTS = "yes, reads weights"
    """As above, and each forward computes with the weights as digital numbers as well."""
    BYPASSES = "yes, bypasses the array"
    """It learns, but computes with a digital copy of the weights: no array is read."""
    REFUSED = "refused"
    """An error is raised before anything has changed."""
    NOT_APPLICABLE = "not applicable"
    """PEFT itself refuses an ordinary digital model of the same shape."""


Merge = Literal["refused", "digital", "none"]
"""Merging writes the arrays and is refused; writes digital parameters only; is not offered."""


class LittleNet(nn.Module):
    """Two digital layers, then three that are several small tiles each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 16)
        self.norm = nn.LayerNorm(16)
        self.body = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16, bias=False))
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(batch, 12)`` to ``(batch, 8)``."""
        y: Tensor = self.head(self.body(self.norm(self.stem(x))))
        return y


class LittleConvNet(nn.Module):
    """Two convolutions and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 12, 2, stride=2)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(batch, 4, 6, 6)`` to ``(batch, 4)``."""
        y: Tensor = self.head(self.down(self.conv(x).relu()).mean((2, 3)))
        return y


def little_llama() -> nn.Module:
    """Make a language model of Hugging Face's transformers with two layers and 32 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
        tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config)
    return model.eval()


def _call(model: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = model(x)
    return y


def _call_llama(model: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = model(input_ids=x).logits
    return y


@dataclass(frozen=True, kw_only=True)
class Family:
    """A little model to try methods on.

    Args:
        build: Makes the digital model; its weights follow ``torch.manual_seed``.
        digital: Layers that are not converted.
        inputs: Makes a batch; it follows ``torch.manual_seed``.
        call: From model and batch to outputs.
    """

    build: Callable[[], nn.Module]
    digital: tuple[str, ...] = ()
    inputs: Callable[[], Tensor]
    call: Callable[[nn.Module, Tensor], Tensor] = _call


FAMILIES: dict[str, Family] = {
    "linear": Family(build=LittleNet, digital=("stem",), inputs=lambda: torch.randn(6, 12)),
    "convolution": Family(build=LittleConvNet, inputs=lambda: torch.randn(3, 4, 6, 6)),
    "language model": Family(
        build=little_llama,
        digital=("lm_head",),
        inputs=lambda: torch.randint(3, 30, (2, 6)),
        call=_call_llama,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method of PEFT, or one variant, and what is expected of it.

    Args:
        name: What the table calls it.
        peft_type: Member of :class:`peft.PeftType`.
        config: From the names of the frozen layers to PEFT's configuration.
        expected: What :func:`try_method` is expected to find.
        note: Why, in a few words.
        family: Key of :data:`FAMILIES`.
        merge: What merging is expected to do.
        reloads: Whether PEFT saves all of it, on an ordinary model, too.
        prepare: What PEFT asks for before the adapter is attached.
        finish: What PEFT asks for afterwards.
        call: From adapted model and batch to outputs; None for that of the family.
        rate: Learning rate at which a few steps lower the loss.
    """

    name: str
    peft_type: str
    config: Callable[[list[str]], PeftConfig]
    expected: Verdict = Verdict.YES
    note: str = ""
    family: str = "linear"
    merge: Merge = "refused"
    reloads: bool = True
    prepare: Callable[[nn.Module, Any, Tensor], None] | None = None
    finish: Callable[[PeftModel, Tensor], None] | None = None
    call: Callable[[nn.Module, Tensor], Tensor] | None = None
    rate: float = 0.01


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What :func:`try_method` found.

    Args:
        verdict: The finding.
        error: What was raised on attaching, as ``"Class: message"``; empty for nothing.
        losses: Loss before each step and after the last.
        arrays_read: Whether every forward read every frozen array.
        weight_reads: Computations of a forward that used weights as digital numbers.
        unchanged: The fingerprint is the same and ``verify`` passes; after an error, the outputs
            and, unless PEFT has prepared the model before, what is trainable are the same, too.
        reloaded: An equal chip with the saved adapter gives exactly the same outputs.
        merge: What merging did; None where nothing was attached.
        kept: After merging was refused, nothing counts as merged and outputs are exactly the same;
            after a digital merge, outputs are the same up to rounding.
    """

    verdict: Verdict
    error: str = ""
    losses: tuple[float, ...] = ()
    arrays_read: bool = False
    weight_reads: int = 0
    unchanged: bool = False
    reloaded: bool = False
    merge: Merge | None = None
    kept: bool = False


def digital_model(family: str) -> nn.Module:
    """Make the little model of a family; it is the same each time.

    Args:
        family: Key of :data:`FAMILIES`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FAMILIES[family].build()


def batch(family: str) -> Tensor:
    """Make the batch of a family; it is the same each time.

    Args:
        family: Key of :data:`FAMILIES`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return FAMILIES[family].inputs()


def frozen_model(family: str, rpu_config: Any) -> Callable[[], nn.Module]:
    """Freeze the little model of a family once, and return a function that gives equal copies.

    Args:
        family: Key of :data:`FAMILIES`.
        rpu_config: Configuration of aihwkit for the tiles.

    Example:
        >>> from aihwkit.simulator.configs import InferenceRPUConfig
        >>> make = frozen_model("linear", InferenceRPUConfig())
        >>> al.fingerprint(make()) == al.fingerprint(make())
        True
    """
    excluded = list(FAMILIES[family].digital)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = convert_to_analog(
            digital_model(family), rpu_config, ensure_analog_root=False, exclude_modules=excluded
        )
    al.freeze_(model, programmed_by="the coverage table")
    return lambda: copy.deepcopy(model)


def try_method(
    method: Method,
    model_factory: Callable[[], nn.Module],
    x: Tensor,
    twin: Callable[[], nn.Module] | None = None,
) -> Outcome:
    """Attach a method to a frozen model, train, save, reload and merge it, and report.

    Args:
        method: What to try.
        model_factory: Makes equal frozen models.
        x: A batch, as the model's family wants it.
        twin: Makes an ordinary digital model of the same shape. Where attaching fails, it decides
            whether the method is refused or PEFT's own.
    Returns:
        What happened. Nothing is raised for a method that fails.

    Example:
        >>> from aihwkit.simulator.configs import InferenceRPUConfig
        >>> from peft import LoraConfig
        >>> lora = Method(
        ...     name="LoRA", peft_type="LORA", config=lambda names: LoraConfig(target_modules=names)
        ... )
        >>> make = frozen_model("linear", InferenceRPUConfig())
        >>> outcome = try_method(lora, make, batch("linear"))
        >>> print(outcome.verdict, outcome.merge, outcome.reloaded)
        yes refused True
    """
    model = model_factory()
    before = _state(method, model, x)
    with _quiet_peft():
        try:
            adapted = _attached(method, model, al.target_modules(model), x)
        except Exception as error:
            same = before == _state(method, model, x)
            verdict = _refusal(method, error, twin, al.target_modules(model), x)
            return Outcome(
                verdict=verdict, error=f"{type(error).__name__}: {error}", unchanged=same
            )
        return _use(method, adapted, model_factory, x, before[1])


def _use(
    method: Method,
    adapted: PeftModel,
    model_factory: Callable[[], nn.Module],
    x: Tensor,
    fingerprint: str,
) -> Outcome:
    arrays_read, weight_reads = _reads(method, adapted, x)
    losses = _train(method, adapted, x)
    al.verify(adapted)
    unchanged = al.fingerprint(adapted) == fingerprint
    reloaded = _reloads(method, adapted, model_factory, x)
    merge, kept = _merge(method, adapted, x)
    works = Verdict.READS_WEIGHTS if weight_reads else Verdict.YES
    return Outcome(
        verdict=works if arrays_read else Verdict.BYPASSES,
        losses=losses, arrays_read=arrays_read, weight_reads=weight_reads,
        unchanged=unchanged, reloaded=reloaded, merge=merge, kept=kept,
    )  # fmt: skip


def _state(method: Method, model: nn.Module, x: Tensor) -> tuple[list[Any], str, list[bool]]:
    """Outputs, fingerprint and what is trainable."""
    outputs = _output(FAMILIES[method.family].call, model, x).tolist()
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    return outputs, al.fingerprint(model), [] if method.prepare else trainable


def _refusal(
    method: Method,
    error: Exception,
    twin: Callable[[], nn.Module] | None,
    names: list[str],
    x: Tensor,
) -> Verdict:
    if twin is None or isinstance(error, al.FrozenConductanceError):
        return Verdict.REFUSED
    try:
        _attached(method, twin(), names, x)
    except Exception:
        return Verdict.NOT_APPLICABLE
    return Verdict.REFUSED


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Leave out what PEFT says about its own settings; the table says the rest."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(peft|transformers|torch)\.")
        yield


def _attached(method: Method, model: nn.Module, names: list[str], x: Tensor) -> PeftModel:
    config = method.config(names)
    if method.prepare is not None:
        method.prepare(model, config, x)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        adapted: PeftModel = get_peft_model(model, config)
    if method.finish is not None:
        method.finish(adapted, x)
    return adapted


def _output(call: Callable[[nn.Module, Tensor], Tensor], model: nn.Module, x: Tensor) -> Tensor:
    """Outputs with the noise of one fixed seed, so that equal models give equal numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return call(model, x)


def _adapted_output(method: Method, model: nn.Module, x: Tensor) -> Tensor:
    return _output(method.call or FAMILIES[method.family].call, model, x)


class _Reads:
    """A read probe that only wants to know whether the array was read."""

    def __init__(self) -> None:
        self.reads = 0

    def on_read(self, *_: Any) -> None:
        self.reads += 1

    def on_repeat(self, *_: Any) -> None: ...

    def on_repeated_cycles(self, *_: Any) -> None: ...

    def on_transposed_read(self, *_: Any) -> None: ...


def _reads(method: Method, model: nn.Module, x: Tensor) -> tuple[bool, int]:
    """Say whether training and evaluation read every array, and count digital weight reads."""
    arrays_read, weight_reads = True, 0
    for training in (True, False):
        model.train(training)
        probes = []
        for _, layer in al.frozen_layers(model):
            probes.append(_Reads())
            layer.analog_module.probes.append(probes[-1])
        with count_weight_reads() as weights:
            _adapted_output(method, model, x)
        for _, layer in al.frozen_layers(model):
            layer.analog_module.probes.pop()
        arrays_read = arrays_read and all(probe.reads for probe in probes)
        weight_reads = max(weight_reads, weights.total())
    return arrays_read, weight_reads


def _train(method: Method, model: nn.Module, x: Tensor) -> tuple[float, ...]:
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=method.rate)
    losses = []
    for step in range(_STEPS + 1):
        loss = (_adapted_output(method, model, x) - 1.0).square().mean()
        losses.append(loss.item())
        if step < _STEPS:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return tuple(losses)


def _reloads(
    method: Method, adapted: PeftModel, model_factory: Callable[[], nn.Module], x: Tensor
) -> bool:
    adapted.eval()
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(model_factory(), folder).eval()
    return torch.equal(_adapted_output(method, adapted, x), _adapted_output(method, loaded, x))


def _merge(method: Method, adapted: PeftModel, x: Tensor) -> tuple[Merge, bool]:
    """Try every way to merge; say what it did, and whether the adapter is in force as before."""
    adapted.eval()
    expected, fingerprint = _adapted_output(method, adapted, x), al.fingerprint(adapted)
    kept = True
    for name, options in _MERGES:
        try:
            getattr(adapted, name)(**options)
        except al.FrozenConductanceError:
            same = torch.equal(_adapted_output(method, adapted, x), expected)
            kept = kept and same and not _merged(adapted)
            continue
        except (NotImplementedError, AttributeError):
            return "none", kept and torch.equal(_adapted_output(method, adapted, x), expected)
        # Biases and norms are digital, so a method that changes only these may write them.
        close = torch.allclose(_adapted_output(method, adapted, x), expected, atol=1e-5)
        return "digital", close and al.fingerprint(adapted) == fingerprint
    return "refused", kept


def _merged(adapted: PeftModel) -> bool:
    layers = (module for module in adapted.modules() if isinstance(module, BaseTunerLayer))
    return any(layer.merged for layer in layers)
