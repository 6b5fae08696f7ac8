"""What all contenders of the benchmark have in common."""

from recipe.system import processor

BATCH = 64
SIZE = 224  # pixels a side of the batches' images
WARMUP = 512  # images before the measurement
IMAGES = 2560  # images of the measurement
EPOCHS = 1000  # more than are read
QUALITY = 90  # of the JPEGs
CORES = processor.cores()
