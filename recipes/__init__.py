"""Recipes: whole runs, read top to bottom, and the command line."""

from aihwkit_lora.recipes.face_recognition import FaceRecognition
from aihwkit_lora.recipes.image_generation import ImageGeneration
from aihwkit_lora.recipes.lm_unlearning import LmUnlearning
from aihwkit_lora.recipes.objective_table import ObjectiveTable
from aihwkit_lora.recipes.recipe import RECIPES, Recipe, run_recipe, run_seeds
from aihwkit_lora.recipes.request_stream import RequestStream
from aihwkit_lora.recipes.run_folder import Finished, RunFolder
from aihwkit_lora.recipes.speaker_authentication import SpeakerAuthentication

__all__ = [
    "RECIPES",
    "FaceRecognition",
    "Finished",
    "ImageGeneration",
    "LmUnlearning",
    "ObjectiveTable",
    "Recipe",
    "RequestStream",
    "RunFolder",
    "SpeakerAuthentication",
    "run_recipe",
    "run_seeds",
]
