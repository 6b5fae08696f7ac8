"""Mean and standard deviation of ImageNet's training pixels.

For red, green and blue, in pixel values from 0 to 255 (paper, sec. 5.1).
"""

MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)
