"""The images: data sets, access to their examples by index, and the input pipeline."""
