"""diffusers' diffusion transformer: labels, times, adapters, arrays, and the recipe with it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import aihwkit_lora as al
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.recipes.canvas import Pixels
from aihwkit_lora.recipes.diffusers_dit import DiffusersDiT, load_dit
from aihwkit_lora.recipes.diffusion import LORA_TARGETS, digital_modules
from aihwkit_lora.recipes.image_generation import ImageGeneration
from aihwkit_lora.recipes.recipe import RECIPES, run_recipe

from .styled_folder import folder_of
from .tiny_diffusers import autoencoder, transformer

STYLES, OBJECTS = 3, 4


@pytest.fixture
def model():
    return DiffusersDiT(transformer(), styles=STYLES, objects=OBJECTS).eval()


def test_labels_are_sums_of_rows_that_all_blocks_share(model):
    labels = {id(block.norm1.emb.class_embedder) for block in model.dit.transformer_blocks}
    assert len(labels) == 1
    embedder = model.dit.transformer_blocks[1].norm1.emb.class_embedder
    wanted = model.style.row(2) + embedder.object.row(3)
    assert torch.equal(embedder(torch.tensor([2 * OBJECTS + 3]))[0], wanted)


def test_it_predicts_what_the_network_of_diffusers_does_at_its_own_times(model):
    noisy, label = torch.randn(3, 1, 20, 20), torch.tensor([0, 5, 11])
    for time, noise in ((0.0, 999.0), (1.0, 0.0), (0.5, 499.5)):
        drawn = model(noisy, torch.full((3,), time), label)
        wanted = model.dit(noisy, timestep=torch.full((3,), noise), class_labels=label).sample
        assert torch.equal(drawn, wanted)


def test_predicted_variances_are_left_out():
    both = DiffusersDiT(transformer(out_channels=2), styles=STYLES, objects=OBJECTS)
    assert both(torch.randn(2, 1, 20, 20), torch.rand(2), torch.tensor([0, 1])).shape[1] == 1


def test_adapters_go_beside_its_mlps_and_its_linear_layers_become_arrays(model):
    chip = al.chips.get("rm-180nm")
    assert digital_modules(model) == ["dit.pos_embed.proj"]
    arrays = al.convert(model, chip, exclude_modules=digital_modules(model)).requires_grad_(False)
    al.program_(arrays, chip, seed=0)
    al.freeze_(arrays)
    # Two of times, one of modulation, four of attention, two of the MLP; two behind all blocks.
    assert len(list(al.frozen_layers(arrays))) == 2 * 9 + 2
    adapted = get_peft_model(arrays, LoraConfig(r=2, target_modules=LORA_TARGETS))
    trained = {n: p.numel() for n, p in adapted.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[0].rsplit("blocks.")[1] for name in trained} == {
        f"{block}.ff.net.{layer}" for block in (0, 1) for layer in ("0.proj", "2")
    }
    assert sum(trained.values()) == 2 * 2 * 2 * (8 + 32)


def test_a_model_of_another_size_or_none_at_all_is_refused(tmp_path):
    transformer().save_pretrained(tmp_path / "dit")
    with pytest.raises(ConfigurationError, match="3 channels of 16 × 16, found one for 1 of 20 × "):
        load_dit(str(tmp_path / "dit"), Pixels((3, 16, 16)), styles=STYLES, objects=OBJECTS)
    with pytest.raises(ConfigurationError, match=r"dit: expected a folder, .*Model, found"):
        load_dit(str(tmp_path / "none"), Pixels((1, 20, 20)), styles=STYLES, objects=OBJECTS)


def test_the_whole_recipe_runs_on_latents_with_it(tmp_path):
    autoencoder(latent_channels=4).save_pretrained(tmp_path / "vae")
    twice = transformer(in_channels=4, out_channels=8, sample_size=8, patch_size=2)
    twice.save_pretrained(tmp_path / "dit")
    photographs = folder_of(tmp_path / "photographs")
    config = ImageGeneration(
        quick=True, data="folder", folder=str(photographs), image_size=16,
        forgotten="ink", new="pixel", unseen=1, noise_microsiemens=(1,),
        vae=str(tmp_path / "vae"), dit=str(tmp_path / "dit"),
    )  # fmt: skip
    report = run_recipe(RECIPES.get("image_generation"), config, tmp_path / "run")
    assert list(report.arms) == ["hybrid", "digital", "deploy_once"]
    # One image of each of three objects is left for testing: too few to be halved.
    assert "judge_frechet_floor" not in report.stage("hybrid", "learn").metrics
    for stage in ("forget", "continue", "restore"):
        counts = report.stage("hybrid", stage).counts
        assert counts["tile_reads"] > 0
        assert counts["set_pulses"] == counts["reset_pulses"] == 0
    # Rank 8 on the MLPs of two blocks of width 8, and one style's row.
    assert report.stage("hybrid", "continue").trainable_parameters == 2 * 2 * 8 * (8 + 32) + 8
    assert (tmp_path / "run" / "pictures" / "hybrid-continue.png").exists()
