"""Local steps: when parameters are averaged, which, and how. See README.md in the folder above."""
