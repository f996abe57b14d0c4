"""What a hook is and what it is given: collectives, bucket, memory, setup. See README.md in this folder."""
