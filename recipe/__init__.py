"""The recipe of ImageNet in one hour (Goyal et al. 2017, arXiv 1706.02677): what is trained."""
