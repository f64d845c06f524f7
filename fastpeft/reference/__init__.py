"""Plain PyTorch definitions of the ops: what they compute, the oracle of the tests, and the backend of last resort."""
