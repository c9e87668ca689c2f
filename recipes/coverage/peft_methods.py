"""Every method of PEFT on frozen arrays: what is expected, and what trying it shows.

The table has a line for each member of :class:`peft.PeftType` and for the variants of LoRA that
differ in how they treat the weights. Nothing in it is taken on trust: :func:`rows` tries.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import peft
import torch
from aihwkit.simulator.configs import (
    FloatingPointRPUConfig,
    InferenceRPUConfig,
    TorchInferenceRPUConfig,
)
from aihwkit.simulator.presets import ReRamESPreset
from peft import PeftModel
from peft.tuners.lora import config as lora
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

from aihwkit_lora.recipes.coverage.peft_trials import (
    Method,
    Outcome,
    Verdict,
    batch,
    digital_model,
    frozen_model,
    try_method,
)

__all__ = ["TILE_KINDS", "Method", "Outcome", "Verdict", "methods", "rows", "try_method"]

_READS, _BYPASSES = Verdict.READS_WEIGHTS, Verdict.BYPASSES
_REFUSED, _NOT = Verdict.REFUSED, Verdict.NOT_APPLICABLE


def _small_tiles(config: Callable[[], Any]) -> Callable[[], Any]:
    """Make tiles of 8 × 8 cells, so that every layer of the little models is several tiles."""

    def make() -> Any:
        made = config()
        made.mapping.max_input_size = made.mapping.max_output_size = 8
        return made

    return make


def _pulsed() -> Any:
    config = ReRamESPreset()
    # aihwkit seeds both from the clock, and a table that is printed twice should be the same.
    config.device.construction_seed, config.device.write_noise_std = 1, 0.0
    return config


TILE_KINDS: dict[str, Callable[[], Any]] = {
    "torch inference": _small_tiles(TorchInferenceRPUConfig),
    "inference": _small_tiles(InferenceRPUConfig),
    "pulsed (ReRAM)": _small_tiles(_pulsed),
    "floating point": _small_tiles(FloatingPointRPUConfig),
}
"""Kinds of tiles of aihwkit, as functions that make a configuration."""


def _lora(
    name: str,
    note: str = "",
    expected: Verdict = Verdict.YES,
    *,
    prepare: Callable[[nn.Module, Any, Tensor], None] | None = None,
    finish: Callable[[PeftModel, Tensor], None] | None = None,
    **options: Any,
) -> Method:
    def config(names: list[str]) -> Any:
        return peft.LoraConfig(**{"r": 4, "target_modules": names, **options})

    return Method(
        name=f"LoRA, {name}", peft_type="LORA", config=config, expected=expected, note=note,
        prepare=prepare, finish=finish,
    )  # fmt: skip


def _method(peft_type: str, name: str, config: Callable[[list[str]], Any], **more: Any) -> Method:
    return Method(peft_type=peft_type, name=name, config=config, **more)


def _on_language_model(
    peft_type: str, name: str, config: str, note: str = "", *, method: Any = None, **options: Any
) -> Method:
    """Describe a method that only makes sense in a transformer; it offers no merging, mostly."""

    def make(names: list[str]) -> Any:
        return getattr(peft, config)(task_type="CAUSAL_LM", **options)

    more = {"merge": "none", **(method or {})}
    return Method(
        peft_type=peft_type, name=name, config=make, note=note, family="language model", **more
    )


def _run_corda(model: nn.Module, config: Any, x: Tensor) -> None:
    preprocess_corda(model, config, run_model=lambda: model(x))


def _run_lora_ga(model: nn.Module, config: Any, x: Tensor) -> None:
    # Its hooks want an input with a gradient.
    inputs = x.clone().requires_grad_()
    preprocess_loraga(model, config, train_step=lambda: model(inputs).sum().backward())


def _run_eva(model: PeftModel, x: Tensor) -> None:
    initialize_lora_eva_weights(
        model, [x], forward_fn=lambda net, inputs: net(inputs),
        prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False,
    )  # fmt: skip


@functools.cache
def _two_adapters() -> tuple[tempfile.TemporaryDirectory[str], dict[str, str]]:
    """Save two LoRA adapters for X-LoRA to mix; the folder lasts as long as the process."""
    folder = tempfile.TemporaryDirectory()
    paths = {name: f"{folder.name}/{name}" for name in ("0", "1")}  # X-LoRA wants numbers
    for seed, path in enumerate(paths.values()):
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False
        )
        model = digital_model("language model")
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # whatever was tried before
            peft.get_peft_model(model, config).save_pretrained(path)
    return folder, paths


def _x_lora(names: list[str]) -> Any:
    return peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=16, xlora_depth=1, adapters=_two_adapters()[1]
    )


def _call_with_tasks(model: nn.Module, x: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=x, task_ids=torch.zeros(len(x), dtype=torch.long)).logits
    return logits


def _call_cpt(model: nn.Module, x: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=x, input_type_mask=torch.ones_like(x)).logits
    return logits


_BIASED = ["body.0", "head"]
"""The layers of the linear model that have a bias."""
_REWRITES = "starts by rewriting the weights"
_PROMPT = "virtual tokens before the input; no layer is touched"
_ON_A_COPY = "computes with weights that it has changed digitally"

_LORA = (
    _lora("plain"),
    _lora("rsLoRA", use_rslora=True),
    _lora("rank and alpha by layer", rank_pattern={"head": 2}, alpha_pattern={"head": 32}),
    _lora("bias in B", target_modules=_BIASED, lora_bias=True),
    _lora("bias='all'", "trains all digital biases", bias="all"),
    _lora("bias='lora_only'", "trains digital biases of adapted layers", bias="lora_only"),
    _lora("dropout", lora_dropout=0.2),
    _lora(
        "all-linear", "exclude digital layers, or a refused merge leaves these merged",
        target_modules="all-linear", exclude_modules=["stem"],
    ),
    _lora("Gaussian start", init_lora_weights="gaussian"),
    _lora("orthogonal start", init_lora_weights="orthogonal"),
    _lora("MiCA start", "decomposes the weights once", init_lora_weights="mica"),
    _lora("EVA start", init_lora_weights="eva", eva_config=lora.EvaConfig(rho=1), finish=_run_eva),
    _lora("DoRA", "norms of weight rows, computed digitally", _READS, use_dora=True),
    _lora(
        "DoRA with dropout", "in training, products as well", _READS,
        use_dora=True, lora_dropout=0.2,
    ),
    _lora("QA-LoRA", use_qalora=True, qalora_group_size=4),
    _lora("VeLoRA", velora_config=lora.VeloraConfig(num_groups=4)),
    _lora("MonteCLoRA", monteclora_config=lora.MontecloraConfig()),
    _lora(
        "BD-LoRA", use_bdlora=lora.BdLoraConfig(target_modules_bd_a=["body.0", "body.2", "head"])
    ),
    _lora("PiSSA start", _REWRITES, _REFUSED, init_lora_weights="pissa"),
    _lora("fast PiSSA start", _REWRITES, _REFUSED, init_lora_weights="pissa_niter_4"),
    _lora("OLoRA start", _REWRITES, _REFUSED, init_lora_weights="olora"),
    _lora(
        "CorDA start", _REWRITES, _REFUSED, prepare=_run_corda, init_lora_weights="corda",
        corda_config=lora.CordaConfig(corda_method="kpm"),
    ),
    _lora(
        "LoRA-GA start",
        "wants the gradient of the weights; by then PEFT has switched off all other gradients",
        _REFUSED,
        prepare=_run_lora_ga, init_lora_weights="lora_ga", lora_ga_config=lora.LoraGAConfig(),
    ),
    _lora("KaSA", _REWRITES, _REFUSED, kasa_config=lora.KasaConfig()),
    _lora(
        "LoftQ start", "needs bitsandbytes; with it, starts by rewriting the weights", _NOT,
        init_lora_weights="loftq", loftq_config=peft.LoftQConfig(loftq_bits=4),
    ),
    _lora(
        "target_parameters", "wants an nn.Parameter, and a frozen weight is none", _REFUSED,
        target_modules=None, target_parameters=["head.weight"],
    ),
)  # fmt: skip

_OTHERS = (
    _method("ADALORA", "AdaLoRA", lambda n: peft.AdaLoraConfig(
        target_modules=n, init_r=4, target_r=2, total_step=10), rate=0.1),
    _method("ADAMSS", "AdaMSS", lambda n: peft.AdamssConfig(
        target_modules=n, r=8, num_subspaces=2)),
    _method("BOFT", "BOFT", lambda n: peft.BOFTConfig(target_modules=n, boft_block_size=4)),
    _method("IA3", "IA3", lambda n: peft.IA3Config(target_modules=n, feedforward_modules=[])),
    _method("IA3", "IA3, feed-forward", lambda n: peft.IA3Config(
        target_modules=n, feedforward_modules=n)),
    _method("BEFT", "BEFT", lambda n: peft.BeftConfig(target_modules=_BIASED),
            merge="digital", note="a digital bias; merging writes only that"),
    _method("LILY", "Lily", lambda n: peft.LilyConfig(
        target_modules=n, r=4, stride_A=1, num_B=2), merge="none"),
    _method("LOHA", "LoHa", lambda n: peft.LoHaConfig(target_modules=n, r=4)),
    _method("LOKR", "LoKr", lambda n: peft.LoKrConfig(target_modules=n, r=4)),
    _method("OFT", "OFT", lambda n: peft.OFTConfig(target_modules=n, oft_block_size=4),
            note="turns the inputs before the array"),
    _method("LN_TUNING", "LN tuning", lambda n: peft.LNTuningConfig(target_modules=["norm"]),
            merge="digital", note="copies of digital norms; no array is touched"),
    _method("VERA", "VeRA", lambda n: peft.VeraConfig(target_modules=n, r=4), rate=0.1),
    _method("FROD", "FRoD", lambda n: peft.FrodConfig(target_modules=n, progressbar=False),
            expected=_BYPASSES, note="computes with factors of the weights, taken when attached"),
    _method("PVERA", "PVeRA", lambda n: peft.PveraConfig(target_modules=n, r=4), rate=0.1),
    _method("FOURIERFT", "FourierFT", lambda n: peft.FourierFTConfig(
        target_modules=n, n_frequency=16, scaling=16.0), rate=0.1),
    _method("GLORA", "GLoRA", lambda n: peft.GloraConfig(target_modules=n, r=4),
            expected=_REFUSED, note="PEFT takes torch.nn.Linear itself, no class derived from it"),
    _method("HRA", "HRA", lambda n: peft.HRAConfig(target_modules=n, r=4),
            expected=_BYPASSES, note=_ON_A_COPY),
    _method("VBLORA", "VB-LoRA", lambda n: peft.VBLoRAConfig(
        target_modules=n, r=2, num_vectors=8, vector_length=4), rate=0.1),
    _method("UNILORA", "Uni-LoRA", lambda n: peft.UniLoraConfig(
        target_modules=n, r=4, theta_d_length=32), rate=0.1),
    _method("MISS", "MiSS", lambda n: peft.MissConfig(target_modules=n, r=4)),
    _method("MISS", "MiSS, bat", lambda n: peft.MissConfig(
        target_modules=n, r=4, init_weights="bat"), expected=_BYPASSES, note=_ON_A_COPY),
    _method("MISS", "MiSS, mini", lambda n: peft.MissConfig(
        target_modules=n, r=4, mini_r=4, init_weights="mini")),
    _method("RANDLORA", "RandLoRA", lambda n: peft.RandLoraConfig(
        target_modules=n, r=4, randlora_alpha=8)),
    _method("ROAD", "RoAd", lambda n: peft.RoadConfig(target_modules=n, group_size=8)),
    _method("HIRA", "HiRA", lambda n: peft.HiraConfig(target_modules=n, r=4), rate=0.05,
            expected=_READS, note="adds a product with the weights, computed digitally"),
    _method("SHIRA", "SHiRA", lambda n: peft.ShiraConfig(target_modules=n, r=4),
            expected=_BYPASSES, note=_ON_A_COPY),
    _method("C3A", "C3A", lambda n: peft.C3AConfig(target_modules=n, block_size=4)),
    _method("WAVEFT", "WaveFT", lambda n: peft.WaveFTConfig(target_modules=n, n_frequency=10)),
    _method("OSF", "OSF", lambda n: peft.OSFConfig(target_modules=n),
            note="decomposes the weights once"),
    _method("DELORA", "DeLoRA", lambda n: peft.DeloraConfig(
        target_modules=n, r=4, delora_lambda=1)),
    _method("GRALORA", "GraLoRA", lambda n: peft.GraloraConfig(
        target_modules=n, r=4, gralora_k=2)),
    _method("TINYLORA", "TinyLoRA", lambda n: peft.TinyLoraConfig(target_modules=n, r=2, u=8),
            rate=0.1, note="decomposes the weights once"),
    _method("PSOFT", "PSOFT", lambda n: peft.PsoftConfig(target_modules=n, r=4),
            note="decomposes the weights once"),
    _method("PEANUT", "PEANuT", lambda n: peft.PeanutConfig(target_modules=n, r=4),
            expected=_READS, note="a network whose input is the weights"),
    _method("SUPERTUNING", "Supertuning", lambda n: peft.SupertuningConfig(
        target_modules=n, sparsity=0.9), expected=_BYPASSES, note=_ON_A_COPY),
    _method("DEFT", "DEFT", lambda n: peft.DeftConfig(target_modules=n, r=4)),
)  # fmt: skip


_TRANSFORMERS = (
    _on_language_model("PROMPT_TUNING", "prompt tuning", "PromptTuningConfig", _PROMPT,
                       num_virtual_tokens=4),
    _on_language_model("MULTITASK_PROMPT_TUNING", "multitask prompt tuning",
                       "MultitaskPromptTuningConfig", _PROMPT, num_virtual_tokens=4, num_tasks=2,
                       method={"call": _call_with_tasks}),
    _on_language_model("P_TUNING", "P-tuning", "PromptEncoderConfig", _PROMPT,
                       num_virtual_tokens=4, encoder_hidden_size=8),
    _on_language_model("PREFIX_TUNING", "prefix tuning", "PrefixTuningConfig",
                       "keys and values before those of the input; no layer is touched",
                       num_virtual_tokens=4),
    _on_language_model("CARTRIDGE", "Cartridge", "CartridgeConfig",
                       "keys and values before those of the input; no layer is touched",
                       num_virtual_tokens=4),
    _on_language_model("CPT", "CPT", "CPTConfig", _PROMPT, cpt_token_ids=[3, 4, 5],
                       cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3],
                       method={"call": _call_cpt}),
    _on_language_model("ADAPTION_PROMPT", "Llama-Adapter", "AdaptionPromptConfig",
                       "prompts inside attention; reads its arrays once more", adapter_len=4,
                       adapter_layers=2, method={"rate": 0.1}),
    _on_language_model("TRAINABLE_TOKENS", "trainable tokens", "TrainableTokensConfig",
                       "rows of a digital embedding; merging writes only these",
                       target_modules=["embed_tokens"], token_indices=list(range(3, 30)),
                       method={"merge": "digital"}),
    _on_language_model("LORA", "aLoRA", "LoraConfig", target_modules=["q_proj", "v_proj"], r=4,
                       alora_invocation_tokens=[12], method={"rate": 0.1}),
    _on_language_model("POLY", "Poly", "PolyConfig", target_modules=["q_proj", "v_proj"], r=4,
                       n_tasks=2, n_skills=2, method={"call": _call_with_tasks}),
    Method(peft_type="XLORA", name="X-LoRA", config=_x_lora, family="language model",
           rate=0.1, reloads=False, note="PEFT 0.21 does not save its classifier"),
    _on_language_model("SHADOW", "ShadowPEFT", "ShadowConfig",
                       "a small digital model beside the large one", r=4),
)  # fmt: skip

_CONVOLUTIONS = {
    **dict.fromkeys(
        ["LoRA, plain", "LoRA, rsLoRA", "AdaLoRA", "IA3", "LoHa", "LoKr", "OFT"], Verdict.YES
    ),
    **dict.fromkeys(["LoRA, DoRA", "HiRA"], _READS),
    **dict.fromkeys(["BOFT", "HRA"], _BYPASSES),
}
"""What PEFT supports on convolutions, and what is expected there."""
_CONVOLUTION_NOTES = {
    **dict.fromkeys(["BOFT", "HRA"], _ON_A_COPY),
    "OFT": "where patches overlap, PEFT 0.21 does not start from the identity",
}


def methods() -> tuple[Method, ...]:
    """List every method of the installed PEFT, its variants, and what is expected of them.

    Example:
        >>> {kind.value for kind in peft.PeftType} == {method.peft_type for method in methods()}
        True
    """
    linear = {method.name: method for method in (*_LORA, *_OTHERS)}
    convolutions = (
        replace(
            linear[name], name=f"{name}, on convolutions", expected=expected,
            family="convolution", note=_CONVOLUTION_NOTES.get(name, linear[name].note),
        )
        for name, expected in _CONVOLUTIONS.items()
    )  # fmt: skip
    return (*linear.values(), *convolutions, *_TRANSFORMERS)


def rows(
    kinds: Mapping[str, Callable[[], Any]] = TILE_KINDS, chosen: Iterable[Method] | None = None
) -> list[list[str]]:
    """Try methods on kinds of tiles, and lay the findings out for a table.

    Args:
        kinds: Functions that make a configuration of aihwkit, by what the table calls them.
        chosen: Methods; None means all.
    Returns:
        A header and one row for each method: name, PEFT's type, what was found on each kind of
        tile, what merging does, and a note. A finding that was not expected says so.

    Example:
        >>> kinds = {"small tiles": TILE_KINDS["inference"]}
        >>> rows(kinds, methods()[:1])[1]
        ['LoRA, plain', 'LORA', 'yes', 'refused', '']
    """
    wanted = list(methods() if chosen is None else chosen)
    factories = {
        (family, kind): frozen_model(family, make())
        for family in {method.family for method in wanted}
        for kind, make in kinds.items()
    }
    table = [["method", "PEFT type", *kinds, "merging", "note"]]
    for method in wanted:
        x, twin = batch(method.family), functools.partial(digital_model, method.family)
        found = [
            try_method(method, factories[method.family, kind], x, twin).verdict for kind in kinds
        ]
        cells = [
            str(each) if each is method.expected else f"{each} (expected: {method.expected})"
            for each in found
        ]
        attached = method.expected not in (_REFUSED, _NOT)
        merging = {"refused": "refused", "digital": "digital parts", "none": "not offered"}
        table.append([
            method.name, method.peft_type, *cells,
            merging[method.merge] if attached else "", method.note,
        ])  # fmt: skip
    return table
