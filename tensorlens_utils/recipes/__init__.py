"""The recipes of the zoo: how each tiny model was made, and how the numbers on its card were measured.

`make zoo`, or `python -m tensorlens_utils.recipes [NAME ...] [--steps N] [--out FOLDER]`, trains them again,
one process per core. A run that was stopped goes on from its state in build/zoo; remove that folder to begin anew.

>>> from tensorlens_utils.recipes import RECIPES
>>> RECIPES["tiny-vit"].steps
4000
"""

from . import digits, induction, reviews, world

RECIPES = {recipe.name: recipe for room in (digits, induction, reviews, world) for recipe in room.RECIPES}
