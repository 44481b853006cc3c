"""Corpora out of public sources, as a YAML file describes them: FlexMix at full size, or one's own."""

from flexolmo_hf.evaluation.data.recipe.build import build_recipe
from flexolmo_hf.evaluation.data.recipe.reading import read_recipe
from flexolmo_hf.evaluation.data.recipe.schema import FLEXMIX, Recipe

__all__ = ["FLEXMIX", "Recipe", "build_recipe", "read_recipe"]
