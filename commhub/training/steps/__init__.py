"""Steps: what lies between gradients that are ready and the driver. See README.md in the folder above."""
