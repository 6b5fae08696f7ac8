"""The ImageNet-in-one-hour recipe (Goyal et al. 2017, arXiv 1706.02677): what is trained; nothing about clusters."""
