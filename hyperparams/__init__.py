"""Hyperparameters for RL Zoo, as YAML files and, for ``-conf``, as modules."""
