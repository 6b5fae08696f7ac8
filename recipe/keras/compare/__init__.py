"""Ways to train with Keras's `fit` on several ranks, compared: `python -m recipe.keras.compare`."""
