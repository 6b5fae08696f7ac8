"""Minutes on two CPU cores: 8,000 small photographs, a shallow ResNet, and the whole recipe."""

from recipe.config import Data, Model, Optimizer, Recipe, Run, Schedule

RECIPE = Recipe(
    k=2,
    n=192,
    epochs=15,
    data=Data(name="fashion_photos", image_size=28, min_area=0.7, remainder="short"),
    model=Model(blocks=(1, 1, 1), width=12, stem="small"),
    optimizer=Optimizer(base_rate=0.2),
    schedule=Schedule(warmup_epochs=2.5, decay_epochs=(10.0, 13.0)),
    run=Run(log_every=5, replica_check_every=50, deterministic=True),
)
