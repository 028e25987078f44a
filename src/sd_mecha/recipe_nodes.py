"""The recipe nodes, under the module name of release 1."""

from sd_mecha.recipes.nodes import LiteralRecipeNode as LiteralRecipeNode
from sd_mecha.recipes.nodes import MergeRecipeNode as MergeRecipeNode
from sd_mecha.recipes.nodes import ModelRecipeNode as ModelRecipeNode
from sd_mecha.recipes.nodes import RecipeNode as RecipeNode
from sd_mecha.recipes.nodes import RecipeVisitor as RecipeVisitor
