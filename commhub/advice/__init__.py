"""What a hook would cost and gain on a network: a prediction from parts that can be measured."""
