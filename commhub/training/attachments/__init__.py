"""What feeds an engine with gradients. See README.md in the folder above."""
