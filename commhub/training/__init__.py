"""What holds a model: registrations, and the way of a step from gradients to averages. See README.md in this folder."""
