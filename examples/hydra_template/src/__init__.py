"""A small project in the layout of lightning-hydra-template."""
