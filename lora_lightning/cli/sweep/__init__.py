"""What ``-m`` does: the jobs of a Hydra multirun checked, started as processes of their own, and told of."""
