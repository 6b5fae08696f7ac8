"""The recipe in native PyTorch, on Horovod's hooks: the network, the step, the replica."""
