"""fedsim: federated growth of transformers, simulated."""
