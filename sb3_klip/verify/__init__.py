"""PPO and KLipPPO side by side, compared bit for bit: ``python -m sb3_klip.verify --help``."""
