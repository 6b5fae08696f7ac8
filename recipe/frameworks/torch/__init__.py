"""The recipe in native PyTorch, on Horovod's collectives: the network, the step, the replica."""
