"""From torch to a frozen, adapted model, on every kind of tile."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from aihwkit.nn import AnalogLinear
from aihwkit.nn.conversion import convert_to_analog
from aihwkit.optim import AnalogSGD
from aihwkit.simulator.configs import InferenceRPUConfig, TorchInferenceRPUConfig
from aihwkit.simulator.presets import ReRamESPreset
from aihwkit.simulator.tiles.inference_torch import TorchInferenceTile
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import aihwkit_lora as al

CHIP = al.chips.get("rm-180nm")
# ES steps are a hundredth of OM's; its cells need more pulses to get anywhere.
PATIENT = replace(CHIP.write_policy, max_pulses=3000)
CONFIGS = [InferenceRPUConfig, TorchInferenceRPUConfig, ReRamESPreset]


def network(inputs=150, hidden=140, outputs=6):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs, bias=False)
    )


def converted(config_class, tile, net=None):
    config = config_class()
    config.mapping.max_input_size = config.mapping.max_output_size = tile
    return convert_to_analog(net or network(), config, ensure_analog_root=False)


def frozen(net=None):
    model = al.convert(net or network(20, 12, 4), CHIP)
    al.program_(model, CHIP, seed=0)
    return al.freeze_(model)


@pytest.fixture(params=CONFIGS, ids=lambda config: config.__name__)
def config_class(request):
    return request.param


@pytest.mark.parametrize(("tile", "tiles"), [(512, 2), (128, 6)])
def test_whole_way_on_every_kind_of_tile(config_class, tile, tiles):
    model, ledger = converted(config_class, tile), al.Ledger()
    logical = {name: model[int(name)].get_weights()[0] for name in ("0", "2")}
    report = al.program_(model, CHIP, ledger=ledger, seed=0, policy=PATIENT)
    assert report.counts["programmed_cells"] == 150 * 140 + 140 * 6
    assert report.counts["verify_reads"] == report.pulses + report.counts["programmed_cells"]
    assert ledger.by_layer("program") == {part.layer: part.counts for part in report.layers}
    assert report.failed_fraction < 0.002
    assert al.freeze_(model) is model
    assert (
        len([t for layer in model if hasattr(layer, "analog_tiles") for t in layer.analog_tiles()])
        == tiles
    )
    for name, wanted in logical.items():
        error = (torch.as_tensor(model[int(name)].weight) - wanted).abs()
        # Within ±0.02 of a cell state where 0.6 or 1 stand for full scale, but for failed cells.
        scale = float(model[int(name)].analog_module.scale.max())
        assert float((error > scale * 0.02 / 0.6 * 1.001).float().mean()) < 0.002
    before = al.fingerprint(model)
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=al.target_modules(model)))
    assert al.fingerprint(peft_model) == before
    peft_model(torch.rand(3, 150)).square().sum().backward()
    assert all(p.grad is not None for p in peft_model.parameters() if p.requires_grad)


def test_same_seed_same_arrays():
    reports = [al.program_(al.convert(network(), CHIP), CHIP, seed=3) for _ in range(2)]
    assert reports[0].counts == reports[1].counts
    other = al.program_(al.convert(network(), CHIP), CHIP, seed=4)
    assert other.counts != reports[0].counts


def test_a_seed_leaves_torchs_generator_alone():
    model = al.convert(network(), CHIP)
    before = torch.get_rng_state()
    al.program_(model, CHIP, seed=3)
    al.freeze_(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_torchs_generator_decides():
    def programmed(seed):
        torch.manual_seed(seed)
        model = al.convert(nn.Sequential(nn.Linear(8, 8, bias=False)).requires_grad_(False), CHIP)
        model[0].set_weights(torch.linspace(-1, 1, 64).view(8, 8))
        torch.manual_seed(seed)
        return al.program_(model, CHIP).counts

    assert programmed(1) == programmed(1)
    assert programmed(1) != programmed(2)


@pytest.mark.parametrize("optimiser", ["Adam", "AnalogSGD"])
def test_nothing_moves_under_any_optimiser_given_all_parameters(optimiser):
    net = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 4))
    model = al.convert(net, CHIP, exclude_modules=["0"])
    al.program_(model, CHIP, seed=0)
    model = get_peft_model(
        al.freeze_(model), LoraConfig(r=2, target_modules=al.target_modules(model))
    )
    model.base_model.model[0].requires_grad_(True)  # so that gradients flow through the arrays
    before = al.fingerprint(model)
    upstream = model.base_model.model[0].weight.clone()
    kind = torch.optim.Adam if optimiser == "Adam" else AnalogSGD
    optimizer = kind(model.parameters(), lr=0.1)
    if optimiser == "AnalogSGD":
        optimizer.regroup_param_groups(model)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.rand(8, 20)).square().sum().backward()
        optimizer.step()
    al.verify(model)
    assert al.fingerprint(model) == before
    assert not torch.equal(model.base_model.model[0].weight, upstream)


def test_freezing_needs_programming():
    with pytest.raises(al.StageError, match=r"layer '0': expected a programmed layer, got a conv"):
        al.freeze_(al.convert(network(), CHIP))


def test_freezing_notices_weights_that_changed_since():
    model = al.convert(network(20, 12, 4), CHIP)
    al.program_(model, CHIP, seed=0)
    model[0].set_weights(torch.rand(12, 20), torch.zeros(12))
    with pytest.raises(al.StageError, match=r"layer '0': expected the weights that program_ left"):
        al.freeze_(model)
    assert isinstance(model[2], AnalogLinear)


def test_freezing_twice_is_refused():
    with pytest.raises(al.StageError, match=r"layer '0': expected an unfrozen layer.*thaw_"):
        al.freeze_(frozen())


def test_programming_frozen_layers_is_refused():
    with pytest.raises(al.StageError, match=r"layer '0': expected an unfrozen layer.*reprogram_"):
        al.program_(frozen(), CHIP)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m: al.freeze_(m), "expected analogue layers to freeze, got none"),
        (lambda m: al.program_(m, CHIP), "expected analogue layers to program, got none"),
        (lambda m: al.thaw_(m), "expected frozen layers to thaw, got none"),
        (lambda m: al.verify(m), "expected frozen layers, got none"),
        (lambda m: al.fingerprint(m), "expected frozen layers, got none"),
        (lambda m: al.target_modules(m), "expected frozen layers below the model, got none"),
        (lambda m: al.reprogram_(m, CHIP), "expected frozen layers to write, got none"),
        (lambda m: al.convert(m, CHIP, exclude_modules=["0"]), "expected layers that can be"),
    ],
)
def test_a_digital_model_is_refused(call, match):
    with pytest.raises(al.StageError, match=match):
        call(nn.Sequential(nn.Linear(2, 2)))


def test_converting_twice_is_refused():
    with pytest.raises(al.StageError, match=r"layer '0': expected a digital layer"):
        al.convert(al.convert(network(), CHIP), CHIP)


class Gated(AnalogLinear):
    """A layer of a user's own; what its forward does, nobody here knows."""

    def forward(self, x_input):
        return torch.sigmoid(super().forward(x_input))


def test_other_layers_are_refused_before_anything_is_replaced():
    model = al.convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), CHIP)
    model[1] = Gated(4, 4, rpu_config=CHIP.rpu_config())
    match = (
        r"layer '1': expected one of AnalogConv1d, .*, got Gated with TorchInferenceTile.*"
        r"tiles\.layers\.freezes\(Gated\)"
    )
    with pytest.raises(al.UnsupportedTileError, match=match):
        al.freeze_(model, programmed_by="test")
    assert isinstance(model[0], AnalogLinear)


class OwnTile(TorchInferenceTile):
    """A tile of a user's own."""


def test_other_tiles_are_refused_with_the_call_that_would_add_them():
    config = CHIP.rpu_config()
    config.tile_class = OwnTile
    model = convert_to_analog(nn.Sequential(nn.Linear(4, 3)), config, ensure_analog_root=False)
    match = r"layer '0': expected tiles of a class .*, got OwnTile.*engines\.add_tile\(OwnTile"
    with pytest.raises(al.UnsupportedTileError, match=match):
        al.freeze_(model, programmed_by="test")
    with pytest.raises(al.UnsupportedTileError, match=match):
        al.program_(model, CHIP)


def test_what_the_fused_engine_lacks_is_named():
    config = InferenceRPUConfig()
    config.forward.ir_drop = 1.0
    model = convert_to_analog(nn.Sequential(nn.Linear(4, 3)), config, ensure_analog_root=False)
    match = r"layer '0': expected forward\.ir_drop = 0\.0, got 1.*engine='auto'"
    with pytest.raises(al.UnsupportedTileError, match=match):
        al.freeze_(model, programmed_by="test", engine="fused")
    assert isinstance(model[0], AnalogLinear)
    (choice,) = al.engines(al.freeze_(model, programmed_by="test"))
    assert (choice.engine, choice.layer) == ("reference", "0")
    assert "expected forward.ir_drop = 0.0, got 1" in choice.reason


def test_an_engine_that_there_is_not_is_named():
    model = al.convert(nn.Sequential(nn.Linear(4, 4)), CHIP)
    with pytest.raises(al.ConfigurationError, match=r"engine 'auto' or 'fused' or .*, got 'fast'"):
        al.freeze_(model, programmed_by="test", engine="fast")


def test_weights_beyond_the_window_are_named_with_the_way_out():
    model = convert_to_analog(nn.Sequential(nn.Linear(4, 3)), InferenceRPUConfig())
    model[0].set_weights(torch.full((3, 4), 1.5), torch.zeros(3))
    with pytest.raises(
        al.ConductanceWindowError, match=r"layer '0'.*80 µS, got 1.5.*remap_analog_weights"
    ):
        al.program_(model, CHIP)
    model.remap_analog_weights()
    assert al.program_(model, CHIP, seed=0).counts["programmed_cells"] == 12


def test_a_bare_layer_is_returned_replaced():
    layer = al.convert(nn.Linear(5, 3), CHIP)
    al.program_(layer, CHIP, seed=0)
    frozen_layer = al.freeze_(layer)
    assert isinstance(frozen_layer, nn.Linear)
    assert isinstance(al.thaw_(frozen_layer), AnalogLinear)
    with pytest.raises(al.StageError, match=r"wrap a single layer in nn\.Sequential"):
        al.target_modules(frozen_layer)


def test_aihwkits_own_programming_counts_as_programmed():
    model = convert_to_analog(nn.Sequential(nn.Linear(5, 3)), InferenceRPUConfig()).eval()
    model.program_analog_weights()
    assert al.freeze_(model)[0].analog_module.programming.source == "aihwkit program_weights"


def test_thawing_gives_back_what_was_frozen(config_class):
    model = converted(config_class, 64, network(100, 70, 3))
    for layer in model:
        if isinstance(layer, AnalogLinear):
            for tile in layer.analog_tiles():
                tile.rpu_config.forward.is_perfect = True
    al.program_(model, CHIP, seed=0, policy=PATIENT)
    weights = {
        n: torch.as_tensor(layer.weight).clone() for n, layer in al.frozen_layers(al.freeze_(model))
    }
    al.thaw_(model)
    for name, weight in weights.items():
        thawed = model[int(name)]
        assert isinstance(thawed, AnalogLinear)
        if config_class is not ReRamESPreset:  # whose write noise aihwkit draws anew
            torch.testing.assert_close(thawed.get_weights()[0], weight, rtol=0, atol=1e-6)
    assert al.freeze_(model) is model


def test_a_pulsed_tile_keeps_its_own_cells_through_freeze_and_thaw():
    model = converted(ReRamESPreset, 64, nn.Sequential(nn.Linear(20, 10)))
    (tile,) = model[0].analog_tiles()
    own = tile.get_hidden_parameters()["dwmin_up"].clone()
    al.program_(model, CHIP, seed=0, policy=PATIENT)
    persistent = tile.get_hidden_parameters()["persistent_weights"].clone()
    al.thaw_(al.freeze_(model))
    (tile,) = model[0].analog_tiles()
    hidden = tile.get_hidden_parameters()
    assert torch.equal(hidden["dwmin_up"], own)
    assert torch.equal(hidden["persistent_weights"], persistent)


def test_thawing_under_adapters_is_refused():
    model = frozen()
    peft_model = get_peft_model(model, LoraConfig(r=1, target_modules=al.target_modules(model)))
    with pytest.raises(al.StageError, match=r"expected a model without adapters.*unload"):
        al.thaw_(peft_model)
    assert isinstance(al.thaw_(peft_model.unload())[0], AnalogLinear)


def test_a_tile_written_behind_our_back_is_named():
    model = frozen()
    model[2].analog_module.programmed.conductance[0, 1, 2] += 1e-3
    with pytest.raises(
        al.FrozenConductanceError, match=r"layer '2', tile \(input 0, output 0\): expected the con"
    ):
        al.verify(model)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_frozen_and_equal(way):
    model, x = frozen(), torch.rand(3, 20)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert al.fingerprint(twin) == al.fingerprint(model)
    assert torch.equal(twin(x), model(x))
    twin[0].analog_module.programmed.conductance[0, 0, 0] += 1
    assert al.fingerprint(twin) != al.fingerprint(model)
    al.verify(model)


def test_state_dict_is_plain_and_never_rewrites_programmed_arrays():
    model, buffer = frozen(), io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    model.load_state_dict(state)
    other = al.convert(network(20, 12, 4), CHIP)
    al.program_(other, CHIP, seed=9)
    al.freeze_(other)
    before = al.fingerprint(other)
    with pytest.raises(al.FrozenConductanceError, match=r"'0\.analog_module\.conductance'"):
        other.load_state_dict(state)
    assert al.fingerprint(other) == before
    fresh = al.freeze_(al.convert(network(20, 12, 4), CHIP), programmed_by="checkpoint")
    fresh.load_state_dict(state)
    assert al.fingerprint(fresh) == al.fingerprint(model)


def test_peft_saves_adapters_only_and_loads_them_back(tmp_path):
    model, x = frozen(), torch.rand(3, 20)
    adapted = get_peft_model(
        copy.deepcopy(model),
        LoraConfig(r=2, target_modules=al.target_modules(model), init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert torch.equal(loaded(x), adapted(x))
    assert not torch.equal(loaded(x), model(x))


def test_two_adapters_add_up():
    model, x = frozen(nn.Sequential(nn.Linear(6, 4))), torch.rand(5, 6)
    plain = model(x)
    config = LoraConfig(r=2, target_modules=al.target_modules(model), init_lora_weights=False)
    adapted = get_peft_model(model, config, adapter_name="one")
    adapted.add_adapter("two", config)
    parts = []
    for name in ("one", "two"):
        adapted.base_model.set_adapter([name])
        parts.append(adapted(x) - plain)
    adapted.base_model.set_adapter(["one", "two"])
    torch.testing.assert_close(adapted(x), plain + sum(parts), rtol=0, atol=1e-5)


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_and_the_adapter_stays_in_force(call):
    model, x = frozen(), torch.rand(3, 20)
    config = LoraConfig(r=2, target_modules=al.target_modules(model), init_lora_weights=False)
    adapted = get_peft_model(model, config)
    before, output = al.fingerprint(adapted), adapted(x)
    with pytest.raises(al.FrozenConductanceError, match=r"layer '0'.*reprogram_"):
        getattr(adapted, call)()
    assert al.fingerprint(adapted) == before
    assert torch.equal(adapted(x), output)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_inits_that_rewrite_the_base_are_refused(init):
    model = frozen()
    before = al.fingerprint(model)
    config = LoraConfig(r=2, target_modules=al.target_modules(model), init_lora_weights=init)
    with pytest.raises(al.FrozenConductanceError, match=r"layer '0'"):
        get_peft_model(model, config)
    assert al.fingerprint(model) == before
