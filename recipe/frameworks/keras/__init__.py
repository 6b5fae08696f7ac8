"""The recipe's replica in Keras 3: the network, the step, the state."""
