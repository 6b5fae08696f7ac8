"""The paper's mathematics as pure functions: NumPy only, no framework."""
