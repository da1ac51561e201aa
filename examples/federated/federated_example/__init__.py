"""A Flower app of federated hybrid fine-tuning."""
