"""Sealed models on disk: they load whole, or not at all."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import aihwkit_lora as al
from aihwkit_lora.errors import SealError, StageError
from aihwkit_lora.unlearning import manifest as on_disk
from aihwkit_lora.unlearning.auditing import audit
from aihwkit_lora.unlearning.manifest import Manifest, load_sealed, save_sealed
from aihwkit_lora.unlearning.request_log import RequestLog
from aihwkit_lora.unlearning.seal import seal_, seals, verify_seals

Make = Callable[..., PeftModel]
Frozen = Callable[..., nn.Module]
FACTORS = "adapters/forget/adapter_model.safetensors"


@pytest.fixture
def sealed(two_adapters: Make) -> PeftModel:
    model = two_adapters()
    seal_(model, "forget", request="person 2")
    return model


@pytest.fixture
def folder(sealed: PeftModel, tmp_path: Path) -> Path:
    save_sealed(sealed, tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("programmed_by", ["test", "checkpoint"])
def test_everything_comes_back(
    sealed: PeftModel, folder: Path, frozen_model: Frozen, inputs: Tensor, programmed_by: str
) -> None:
    log = RequestLog(None)
    base = frozen_model(seed=0 if programmed_by == "test" else 7, programmed_by=programmed_by)
    loaded = load_sealed(base, folder, log=log)
    assert torch.equal(loaded(inputs), sealed(inputs))
    assert seals(loaded) == seals(sealed)
    assert list(loaded.peft_config) == ["forget", "learn"]
    assert loaded.active_adapters == ["forget", "learn"]
    assert not any(each.requires_grad for each in loaded.parameters())
    assert [(entry.kind, entry.request) for entry in log.entries()] == [("load", "person 2")]
    with pytest.raises(SealError, match="disable_adapter"):
        loaded.disable_adapter()


def test_scales_seals_and_order_come_back(
    two_adapters: Make, frozen_model: Frozen, inputs: Tensor, tmp_path: Path
) -> None:
    model = al.digitize_(two_adapters(), al.DigitalUnit(bits=8))
    model.base_model.set_adapter(["learn", "forget"])
    for layer in (model.base_model.model[0], model.base_model.model[3]):
        layer.scaling["learn"] *= -0.5  # as task negation does
    seal_(model, "learn", request="person 4", level="reprogrammed")
    seal_(model, "forget", request="person 2")
    written = save_sealed(model, tmp_path / "saved")
    assert written.active == ("learn", "forget")
    loaded = al.digitize_(load_sealed(frozen_model(), tmp_path / "saved"), al.DigitalUnit(bits=8))
    assert torch.equal(loaded(inputs), model(inputs))
    assert {seal.request: seal.level for seal in seals(loaded)} == {
        "person 4": "reprogrammed", "person 2": "suppressed"
    }  # fmt: skip


def test_inactive_adapters_and_the_name_default_are_saved(
    sealed: PeftModel, frozen_model: Frozen, branch: Any, inputs: Tensor, tmp_path: Path
) -> None:
    sealed.add_adapter("default", branch(["2"]))
    sealed.set_adapter("forget")
    save_sealed(sealed, tmp_path / "saved")
    loaded = load_sealed(frozen_model(), tmp_path / "saved")
    assert list(loaded.peft_config) == ["forget", "learn", "default"]
    assert loaded.active_adapters == ["forget"]
    assert torch.equal(loaded(inputs), sealed(inputs))


def test_a_loaded_model_is_saved_again(folder: Path, frozen_model: Frozen, tmp_path: Path) -> None:
    again = save_sealed(load_sealed(frozen_model(), folder), tmp_path / "again")
    first = Manifest.read(folder)
    assert (again.adapters, again.active) == (first.adapters, first.active)
    assert again.base_sha256 == first.base_sha256


def test_the_base_is_saved_as_it_is_without_peft(folder: Path, frozen_model: Frozen) -> None:
    stored = torch.load(folder / "base.pt", weights_only=True)
    assert stored["manifest_sha256"] == Manifest.read(folder).sha256
    base = frozen_model(seed=3, programmed_by="checkpoint")
    base.load_state_dict(stored["state_dict"])
    assert al.fingerprint(base) == Manifest.read(folder).base_fingerprint


def test_digital_layers_and_modules_to_save_of_the_base(
    frozen_model: Frozen, branch: Any, inputs: Tensor, tmp_path: Path
) -> None:
    def base() -> nn.Module:
        torch.manual_seed(5)
        parts = {"array": frozen_model(), "middle": nn.Linear(3, 3), "head": nn.Linear(3, 2)}
        return nn.Sequential(OrderedDict(parts)).eval()

    model = get_peft_model(base(), branch(["array.0", "middle"]), adapter_name="forget")
    seal_(model, "forget", request="person 2")
    model.add_adapter("learn", branch(["array.0"], modules_to_save=["head"]))
    assert list(on_disk.base_state(model)) == list(base().state_dict())
    save_sealed(model, tmp_path / "saved")
    other = base()
    nn.init.zeros_(other.middle.weight)
    assert torch.equal(load_sealed(other, tmp_path / "saved")(inputs), model(inputs))


# --- what is refused ------------------------------------------------------------------------------


def edit(path: Path, change: Callable[[Any], Any], *, rehash: bool = False) -> None:
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))
    if rehash:
        del body["sha256"], body["schema"]
        lists = {name: tuple(body.pop(name)) for name in ("active", "adapters")}
        Manifest(**lists, **body).write(path.parent)


def drop(adapter: str) -> Callable[[Any], None]:
    def change(body: Any) -> None:
        body["adapters"] = [each for each in body["adapters"] if each["name"] != adapter]
        body["active"] = [name for name in body["active"] if name != adapter]
        body["files"] = {k: v for k, v in body["files"].items() if f"/{adapter}/" not in k}

    return change


def unseal(body: Any) -> None:
    body["adapters"][0]["sealed"] = None


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def other_base(path: Path) -> None:
    stored = torch.load(path, weights_only=True)
    stored["state_dict"]["3.bias"] += 1.0
    torch.save(stored, path)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda f: (f / "seal.json").unlink(), "seal.json: expected the manifest"),
    "half a manifest": (lambda f: os.truncate(f / "seal.json", 99), "got one that cannot be read"),
    "a list": (lambda f: (f / "seal.json").write_text("[]"), "got one that cannot be read"),
    "edited request": (
        lambda f: edit(f / "seal.json", lambda b: b["adapters"][0]["sealed"].update(request="x")),
        "seal.json: expected the file as it was saved, got other contents",
    ),
    "dropped adapter": (lambda f: edit(f / "seal.json", drop("forget")), "got other contents"),
    "other schema": (lambda f: edit(f / "seal.json", lambda b: b.update(schema=2)), "got other co"),
    "dropped, hash renewed": (
        lambda f: edit(f / "seal.json", drop("forget"), rehash=True),
        "base.pt: expected the base that belongs to manifest",
    ),
    "seal dropped, hash renewed": (
        lambda f: edit(f / "seal.json", unseal, rehash=True),
        "base.pt: expected the base that belongs to manifest",
    ),
    "no adapter": (lambda f: shutil.rmtree(f / "adapters" / "forget"), "expected a file of the se"),
    "adapter renamed": (
        lambda f: (f / "adapters" / "forget").rename(f / "adapters" / "forgot"),
        "expected a file of the sealed model, got none",
    ),
    "adapter edited": (lambda f: flip(f / FACTORS), f"{FACTORS}: expected the file as it was"),
    "adapter exchanged": (
        lambda f: shutil.copy(f / FACTORS.replace("forget", "learn"), f / FACTORS),
        f"{FACTORS}: expected the file as it was saved, got other contents",
    ),
    "config edited": (
        lambda f: edit(f / "adapters/forget/adapter_config.json", lambda b: b.update(lora_alpha=0)),
        "adapter_config.json: expected the file as it was saved",
    ),
    "no base": (lambda f: (f / "base.pt").unlink(), "base.pt: expected the base of the sealed mo"),
    "half a base": (lambda f: os.truncate(f / "base.pt", 999), "base.pt: .* that cannot be read"),
    "base edited": (lambda f: other_base(f / "base.pt"), "base.pt: .* got other tensors"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_folders_do_not_load(folder: Path, frozen_model: Frozen, what: str) -> None:
    damage, message = DAMAGE[what]
    damage(folder)
    base = frozen_model(seed=7, programmed_by="checkpoint")
    before = al.fingerprint(base)
    with pytest.raises(SealError, match=message):
        load_sealed(base, folder)
    assert al.fingerprint(base) == before
    assert not any("lora" in name for name, _ in base.named_modules())


def test_another_base_is_refused(folder: Path, frozen_model: Frozen) -> None:
    with pytest.raises(SealError, match=r"expected the base that .* got arrays with fingerprint"):
        load_sealed(frozen_model(seed=1), folder)
    torch.manual_seed(0)
    small = al.convert(nn.Sequential(nn.Linear(4, 3)), al.chips.get("rm-180nm"))
    small = al.freeze_(small, programmed_by="checkpoint")
    with pytest.raises(SealError, match="got one that does not take in the saved state"):
        load_sealed(small, folder)
    with pytest.raises(StageError, match="expected frozen layers, got none"):
        load_sealed(nn.Linear(2, 1), folder)


def test_a_forged_hash_of_an_adapter_is_refused(folder: Path, frozen_model: Frozen) -> None:
    def forge(body: Any) -> None:
        body["adapters"][0]["sealed"]["adapter_sha256"] = "0" * 64

    edit(folder / "seal.json", forge, rehash=True)
    stored = torch.load(folder / "base.pt", weights_only=True)
    torch.save(stored | {"manifest_sha256": Manifest.read(folder).sha256}, folder / "base.pt")
    with pytest.raises(SealError, match="expected the layers that were sealed, got others"):
        load_sealed(frozen_model(), folder)


def test_stock_peft_loads_what_it_is_given(
    sealed: PeftModel, folder: Path, frozen_model: Frozen, inputs: Tensor
) -> None:
    """The documented limit: whoever has the files can leave the seal out."""
    base = frozen_model()
    bare = base(inputs)
    loaded = PeftModel.from_pretrained(base, folder / "adapters" / "forget", adapter_name="any")
    assert seals(loaded) == ()
    with loaded.disable_adapter():
        assert torch.equal(loaded(inputs), bare)


def test_only_sound_models_are_saved(two_adapters: Make, tmp_path: Path) -> None:
    with pytest.raises(SealError, match="expected sealed adapters, got none"):
        save_sealed(two_adapters(), tmp_path / "saved")
    model = two_adapters()
    seal_(model, "forget", request="person 2")
    with (
        audit(model, reason="check"),
        pytest.raises(SealError, match="in force, got a running audit"),
    ):
        save_sealed(model, tmp_path / "saved")
    model.base_model.model[0].lora_A["forget"].weight.data.add_(1.0)
    with pytest.raises(SealError, match="other tensors"):
        save_sealed(model, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(sealed: PeftModel, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SealError, match="expected a new or an empty folder"):
        save_sealed(sealed, folder)
    (tmp_path / "empty").mkdir()
    save_sealed(sealed, tmp_path / "empty")


def test_errors_leave_nothing_behind(
    sealed: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        save_sealed(sealed, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


SAVER = """
import os, signal, sys, time, random
import torch
from pathlib import Path
from peft import LoraConfig, get_peft_model
from torch import nn
import aihwkit_lora as al
from aihwkit_lora.unlearning.manifest import save_sealed
from aihwkit_lora.unlearning.seal import seal_

torch.set_num_threads(1)
model = al.convert(nn.Sequential(nn.Linear(10, 3)), al.chips.get("rm-180nm"))
model = al.freeze_(model, programmed_by="test")
model = get_peft_model(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
seal_(model, "default", request="person 2")
folder, moments = Path(sys.argv[1]), random.Random(0)
for kill in range(8):
    child = os.fork()  # what is imported here is imported once
    if not child:
        for number in range(10**6):
            save_sealed(model, folder / f"{kill}-{number:06}")
    while not (folder / f"{kill}-000000").exists():
        time.sleep(0.001)
    time.sleep(moments.uniform(0.0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


@pytest.mark.slow
def test_kills_leave_whole_folders_or_none(tmp_path: Path, frozen_model: Frozen) -> None:
    subprocess.run([sys.executable, "-c", SAVER, str(tmp_path)], check=True)
    found = sorted(tmp_path.iterdir())
    whole = [path for path in found if not path.name.startswith(".")]
    assert len(whole) >= 8
    # A writer does nothing but save, so that all eight kills fall between two saves by a chance of
    # less than one in a thousand, even if a draft exists for just 60 % of the time.
    assert len(found) > len(whole)
    for path in random.Random(0).sample(whole, min(len(whole), 10)) + whole[-1:]:
        torch.manual_seed(0)
        base = al.convert(nn.Sequential(nn.Linear(10, 3)), al.chips.get("rm-180nm"))
        verify_seals(load_sealed(al.freeze_(base, programmed_by="checkpoint"), path))
    for draft in set(found) - set(whole):
        base = frozen_model()
        with pytest.raises(SealError):
            load_sealed(base, draft)
