"""What becomes of a Keras `fit` in each way to train it on several ranks; `python -m recipe.keras.compare`."""
