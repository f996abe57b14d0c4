"""Where ranks meet for a call that takes all of them, and compare. See README.md in the folder above."""
