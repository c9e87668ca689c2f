"""Sealed models on disk: adapters, base and a manifest that belong together.

A folder holds ``seal.json`` (the manifest), ``base.pt`` (the state of the base, which names the
manifest's hash) and ``adapters/<name>/`` as PEFT saves them. It appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from aihwkit_lora.errors import FrozenConductanceError, SealError
from aihwkit_lora.tiles.freeze import fingerprint, required_layers
from aihwkit_lora.unlearning.adapter_digest import lora_layers, tensors_digest, tuner_of
from aihwkit_lora.unlearning.levels import ForgettingLevel
from aihwkit_lora.unlearning.request_log import RequestLog, sync_folder
from aihwkit_lora.unlearning.seal import peft_model, put_, record, verify_seals
from aihwkit_lora.unlearning.seal_book import Seal
from aihwkit_lora.unlearning.sealed_layers import SealedModel

MANIFEST, BASE, ADAPTERS = "seal.json", "base.pt", "adapters"
_SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder with a sealed model has to hold.

    Args:
        base_fingerprint: Of the arrays.
        base_sha256: Hash of the state of the base, its digital parameters included.
        active: Adapters that act, in the order in which they add up.
        adapters: All adapters in the order in which they were added: name, scale by layer, and
            for sealed ones request, date, level and hash.
        files: SHA-256 by path, relative to the folder.
    """

    base_fingerprint: str
    base_sha256: str
    active: tuple[str, ...]
    adapters: tuple[Mapping[str, Any], ...]
    files: Mapping[str, str]

    @property
    def body(self) -> dict[str, Any]:
        """What stands in the file, without its hash."""
        return {"schema": _SCHEMA, **self.__dict__}

    @property
    def sha256(self) -> str:
        """Hash of the body."""
        return hashlib.sha256(json.dumps(self.body, sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write the file.

        Args:
            folder: Where the model is.
        """
        text = json.dumps({**self.body, "sha256": self.sha256}, indent=2)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the file, and check that nobody has edited it.

        Args:
            folder: Where the model is.
        Raises:
            SealError: It is missing or edited, or of another schema.
        """
        path = folder / MANIFEST
        if not path.exists():
            raise SealError(
                f"{path}: expected the manifest of a sealed model, got none. Load a folder that "
                "save_sealed(peft, folder) has written; do not run its base without it."
            )
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            claimed, schema = body.pop("sha256"), body.pop("schema")
            active, adapters = tuple(body.pop("active")), tuple(body.pop("adapters"))
            manifest = cls(active=active, adapters=adapters, **body)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _edited(path, "one that cannot be read") from error
        if schema != _SCHEMA or manifest.sha256 != claimed:
            raise _edited(path, "other contents")
        return manifest


def _edited(path: Path, found: str) -> SealError:
    return SealError(
        f"{path}: expected the file as it was saved, got {found}. It was edited or damaged; take "
        "the folder from a copy."
    )


def save_sealed(peft: nn.Module, folder: str | Path) -> Manifest:
    """Save a sealed model: its base, all adapters and the manifest, whole or not at all.

    Args:
        peft: A model with sealed adapters, or a module that contains one.
        folder: A new or an empty folder.
    Returns:
        The manifest.
    Raises:
        SealError: Nothing is sealed, a sealed adapter was altered, an audit is running, or the
            folder holds something.

    Example:
        >>> import aihwkit_lora as al
        >>> from aihwkit_lora.unlearning.seal import seal_
        >>> from peft import get_peft_model
        >>> chip = al.chips.get("rm-180nm")
        >>> model = al.convert(nn.Sequential(nn.Linear(16, 8)), chip)
        >>> model = al.freeze_(model, programmed_by="example")
        >>> peft = get_peft_model(model, al.AnalogLoraConfig.for_model(model, r=2))
        >>> _ = seal_(peft, "default", request="person 2")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(save_sealed(peft, folder).files)
        ['adapters/default/adapter_config.json', 'adapters/default/adapter_model.safetensors']
    """
    verify_seals(peft)
    model, folder = peft_model(peft), Path(folder)
    assert isinstance(model, SealedModel)  # it has seals
    if not model.seal_book.in_force:
        raise SealError(
            f"{folder}: expected seals that are in force, got a running audit. Save after it."
        )
    if folder.exists() and any(folder.iterdir()):
        raise SealError(
            f"{folder}: expected a new or an empty folder, got one that holds something. Choose "
            "another, so that what was saved before stays whole."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, so that renaming it is one step.
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        manifest = _write(model, draft)
        draft.chmod(0o755)
        draft.rename(folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return manifest


def _write(model: SealedModel, draft: Path) -> Manifest:
    adapters = draft / ADAPTERS
    for name in model.peft_config:
        # PEFT gives a folder of its own to every adapter but 'default'.
        target = adapters / name if name == "default" else adapters
        PeftModel.save_pretrained(model, str(target), selected_adapters=[name])
        (target / "README.md").unlink()  # PEFT's card, which says nothing of seals
    base = base_state(model)
    manifest = Manifest(
        base_fingerprint=fingerprint(model),
        base_sha256=_state_digest(base),
        active=tuple(tuner_of(model).active_adapters),
        adapters=tuple(_described(model, name) for name in model.peft_config),
        files={path: _file_digest(draft / path) for path in _paths(draft)},
    )
    torch.save({"manifest_sha256": manifest.sha256, "state_dict": base}, draft / BASE)
    manifest.write(draft)
    for path in [*draft.rglob("*"), draft]:
        _sync(path)
    return manifest


def _sync(path: Path) -> None:
    if path.is_dir():
        sync_folder(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _paths(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _described(model: SealedModel, adapter: str) -> dict[str, Any]:
    layers = lora_layers(model, adapter)
    described = {
        "name": adapter,
        "scaling": {name: layer.scaling[adapter] for name, layer in layers},
        "sealed": None,
    }
    if seal := model.seal_book.seals.get(adapter):
        names = ("request", "date", "level", "adapter_sha256")
        described["sealed"] = {name: str(getattr(seal, name)) for name in names}
    return described


def base_state(model: PeftModel) -> dict[str, Any]:
    """State of the base under the names that it has without PEFT.

    Args:
        model: A model of PEFT.
    """
    inner = tuner_of(model).model
    state = dict(inner.state_dict())
    for name, module in inner.named_modules():
        if isinstance(module, LoraLayer | AuxiliaryTrainingWrapper):
            kept = "base_layer" if isinstance(module, LoraLayer) else "original_module"
            state = dict(_without_wrapper(state, f"{name}.", f"{name}.{kept}."))
    return state


def _without_wrapper(state: Mapping[str, Any], wrapper: str, kept: str) -> Any:
    for key, value in state.items():
        if key.startswith(kept):
            yield wrapper + key.removeprefix(kept), value
        elif not key.startswith(wrapper):
            yield key, value


def _state_digest(state: Mapping[str, Any]) -> str:
    return tensors_digest({name: each for name, each in state.items() if isinstance(each, Tensor)})


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_sealed(
    base_model: nn.Module, folder: str | Path, *, log: RequestLog | None = None
) -> PeftModel:
    """Load a sealed model: its base, all of its adapters in their order, and their seals.

    Everything is checked before the base is touched. Sealed adapters leave training, and so do the
    others, as with PEFT.

    Args:
        base_model: The frozen base that the model was saved with, or one of the same shape that was
            frozen with ``freeze_(model, programmed_by="checkpoint")`` and takes the saved one in.
        folder: What ``save_sealed`` has written.
        log: Where the seals go on; loading is written there. In memory if None.
    Returns:
        The model of PEFT around ``base_model``.
    Raises:
        SealError: A file is missing, renamed or edited, adapters and base do not belong together,
            or the base is another one.
        StageError: The base is not frozen.

    Example:
        >>> load_sealed(nn.Linear(2, 1), "no-such-folder")
        Traceback (most recent call last):
        ...
        aihwkit_lora.errors.SealError: no-such-folder/seal.json: expected the manifest ...
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    state = _checked(folder, manifest)
    _load_base(base_model, state, manifest, folder)
    model = _with_adapters(base_model, manifest, folder)
    log = RequestLog(None) if log is None else log
    for described in manifest.adapters:
        if described["sealed"] is not None:
            seal = _seal_of(described, manifest, log)
            record("load", seal)
            put_(model, seal)
    verify_seals(model)
    return model


def _checked(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Check all files; return the state of the base."""
    for name, sha256 in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise SealError(
                f"{path}: expected a file of the sealed model, got none. It was removed or "
                "renamed; the base does not run without its sealed adapters."
            )
        if _file_digest(path) != sha256:
            raise _edited(path, "other contents")
    path = folder / BASE
    if not path.is_file():
        raise SealError(
            f"{path}: expected the base of the sealed model, got none. Take the folder from a copy."
        )
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        claimed, state = stored["manifest_sha256"], stored["state_dict"]
    except Exception as error:  # whatever a damaged file may raise
        raise _edited(path, "one that cannot be read") from error
    if claimed != manifest.sha256:
        raise SealError(
            f"{path}: expected the base that belongs to manifest {manifest.sha256[:12]}…, got one "
            f"that belongs to {claimed[:12]}…. A manifest or a base was exchanged; take the folder "
            "from a copy."
        )
    if _state_digest(state) != manifest.base_sha256:
        raise _edited(path, "other tensors")
    return dict(state)


def _load_base(
    base_model: nn.Module, state: Mapping[str, Any], manifest: Manifest, folder: Path
) -> None:
    layers = [layer for _, layer in required_layers(base_model)]
    awaited = all(layer.analog_module.programming.source == "checkpoint" for layer in layers)
    found = fingerprint(base_model)
    if not awaited and found != manifest.base_fingerprint:
        raise _other_base(folder, f"arrays with fingerprint {found[:12]}…")
    try:
        base_model.load_state_dict(dict(state))
    except (RuntimeError, FrozenConductanceError) as error:
        raise _other_base(folder, "one that does not take in the saved state") from error
    if (found := fingerprint(base_model)) != manifest.base_fingerprint:
        raise _other_base(folder, f"arrays with fingerprint {found[:12]}…")


def _other_base(folder: Path, found: str) -> SealError:
    return SealError(
        f"{folder}: expected the base that its adapters were sealed on, got {found}. Pass that "
        "base, or one of its shape that was frozen with freeze_(model, "
        "programmed_by='checkpoint')."
    )


def _with_adapters(base_model: nn.Module, manifest: Manifest, folder: Path) -> PeftModel:
    names = [described["name"] for described in manifest.adapters]
    places = {name: str(folder / ADAPTERS / name) for name in names}
    model = PeftModel.from_pretrained(base_model, places[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(places[name], adapter_name=name)
    for described in manifest.adapters:
        for name, layer in lora_layers(model, described["name"]):
            # PEFT saves what a scale is by default, not what it was.
            layer.scaling[described["name"]] = described["scaling"][name]
    tuner_of(model).set_adapter(list(manifest.active), inference_mode=True)
    return model


def _seal_of(described: Mapping[str, Any], manifest: Manifest, log: RequestLog) -> Seal:
    sealed = dict(described["sealed"])
    level = ForgettingLevel(sealed.pop("level"))
    return Seal(
        adapter=described["name"],
        level=level,
        base_fingerprint=manifest.base_fingerprint,
        log=log,
        **sealed,
    )
