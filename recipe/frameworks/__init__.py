"""What Keras and PyTorch each bring to the training loop."""
