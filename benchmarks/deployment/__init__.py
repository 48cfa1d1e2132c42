"""What it takes to use a bank: forward passes, one picture, a folder, fitting, and other programs on the same pictures."""
