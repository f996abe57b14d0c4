"""Names: what is installed, what a hook string says, and the way from one to a hook. Loads no torch. See README.md."""
