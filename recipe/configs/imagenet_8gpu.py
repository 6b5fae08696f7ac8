"""The paper's baseline: 8 workers, minibatch 256, η = 0.1 (sec. 5.1). Without warmup: kη is η."""

from recipe.config import Recipe, Schedule

RECIPE = Recipe(k=8, n=32, schedule=Schedule(warmup="none"))
