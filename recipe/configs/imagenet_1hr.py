"""The paper's headline: 256 workers, minibatch 8192, η = 0.1 → 3.2 (sec. 5.1)."""

from recipe.config import Recipe

RECIPE = Recipe(k=256, n=32)
